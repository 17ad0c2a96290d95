"""The LoRA adapters an engine offers, by name: how they come and go while it works.

    read      any thread: the files, checked against the model; nothing else changes
    add       between two steps: from now on requests may name it
    remove    between two steps: no new request may; those that have it finish with it

A request holds its adapter itself, so an adapter leaves memory with its name or with the last
request that has it, whichever is later. Until then it counts for `max_loras`.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path

from ernie.adapter_files import read_adapter
from ernie.adapters import Adapter
from ernie.fused import FusedBlock
from ernie.model import ErnieModel
from fastdeploy.config import EngineConfig
from fastdeploy.errors import RequestError

log = logging.getLogger("fastdeploy")

MAX_NAME = 128  # characters


class Adapters:
    def __init__(self, model: ErnieModel, config: EngineConfig) -> None:
        self.config, self.network = config, model.config
        self.dtype = model.model.norm.weight.dtype  # that of the weights: half the reads
        self.device = model.device
        self.by_name: dict[str, Adapter] = {}
        if config.enable_lora:
            blocks = [block for block in model.model.layers if isinstance(block, FusedBlock)]
            assert len(blocks) == len(model.model.layers), "adapters need the inference form"

    def get(self, name: str) -> Adapter:
        """Raises RequestError, with the names there are."""
        self._check_enabled()
        if name not in self.by_name:
            there = ", ".join(map(repr, self.by_name)) or "none"
            raise RequestError(
                f"there is no adapter {name[:MAX_NAME]!r} here; loaded: {there}",
                param="lora",
                status=404,
            )
        return self.by_name[name]

    def read(self, folder: str | Path) -> Adapter:
        """The adapter in a folder, ready for `add`. Raises ConfigError, CheckpointError."""
        self._check_enabled()
        return read_adapter(
            folder,
            self.network,
            max_rank=self.config.max_lora_rank,
            dtype=self.dtype,
            device=self.device,
        )

    def check_name(self, name: str) -> None:
        """Raise RequestError unless an adapter may be loaded under this name."""
        self._check_enabled()
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise RequestError(
                f"{name[:MAX_NAME]!r} is no name for an adapter; it takes 1 to {MAX_NAME} "
                "printable characters",
                param="lora_name",
            )
        if name in self.by_name:
            raise RequestError(
                f"there is an adapter {name!r} already; unload it first, or choose another name",
                param="lora_name",
                status=409,
            )

    def add(self, name: str, adapter: Adapter, in_use: Set[Adapter]) -> None:
        """`in_use` are those that requests have."""
        self.check_name(name)
        num_held = len(in_use | set(self.by_name.values()))
        if num_held >= self.config.max_loras:
            raise RequestError(
                f"{num_held} adapters are in memory, as many as max_loras allows; unload one and "
                "wait until no request has it",
                status=409,
            )
        # A new dict: other threads may be reading the old one.
        self.by_name = {**self.by_name, name: adapter}
        log.info(
            "adapter %r is loaded: rank %d, %.1f MiB", name, adapter.rank, adapter.num_bytes / 2**20
        )

    def remove(self, name: str) -> None:
        self.get(name)
        self.by_name = {other: one for other, one in self.by_name.items() if other != name}
        log.info("adapter %r is unloaded", name)

    def _check_enabled(self) -> None:
        if not self.config.enable_lora:
            raise RequestError(
                "adapters are not enabled; start with enable_lora (--enable-lora)", param="lora"
            )
