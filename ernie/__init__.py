"""The ERNIE 4.5 model family. `ernie.load(path)` gives a model; see docs/architecture.md for the
walk.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie.checkpoint.io import load, save
    from ernie.model import ErnieModel
    from ernie.models import MODELS
    from ernie.tokenizer import Tokenizer

__all__ = ["MODELS", "ErnieModel", "Tokenizer", "load", "save"]

_HOMES = {
    "load": "ernie.checkpoint.io",
    "save": "ernie.checkpoint.io",
    "ErnieModel": "ernie.model",
    "MODELS": "ernie.models",
    "Tokenizer": "ernie.tokenizer",
}


def __getattr__(name: str) -> Any:
    # Names are fetched on first use, so that `import ernie.tokenizer` does not import torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ernie' has no attribute {name!r}")
