"""What must stand before any test module is imported."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when it is imported, which other packages do too: kernels run interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def loggers_that_propagate() -> Iterator[None]:
    """`erniekit` as it is called in a test logs to that test's stdout, and to no other's."""
    yield
    for name in ("erniekit", "ernie"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def unwritten_cache() -> Iterator[None]:
    """What was never written to a key/value cache may be anything: here NaN, in every format."""
    from fastdeploy.engine.cache import KVCache

    allocate = KVCache.allocate

    def filled(*args: Any, **settings: Any) -> KVCache:
        cache = allocate(*args, **settings)
        for kept in (cache.keys_LBPGr, cache.values_LBPGr):
            kept.view(torch.uint8).fill_(255)
        return cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "allocate", filled)
        yield
