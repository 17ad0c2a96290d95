"""The LoRA adapters an engine offers, by name: how they come and go while it works.

    read      any thread: the files, checked against the model; nothing else changes
    add       between two steps: from now on requests may name it
    remove    between two steps: no new request may; those that have it finish with it

A request holds its adapter itself, so an adapter leaves memory with its name or with the last
request that has it, whichever is later. Until then it counts for `max_loras`.

Where ranks share the model, each holds the pairs' slices beside its own of the weights. Rank 0
reads for all, so that they are of the same files, and sends the others theirs: all have an adapter
or none. It says so too when no request can have an adapter any more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from ernie.adapter_files import read_adapter
from ernie.adapters import Adapter
from ernie.fused import FusedBlock
from ernie.model import ErnieModel
from fastdeploy.config import EngineConfig
from fastdeploy.engine.frames import packed_adapter
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.request import Request
from fastdeploy.errors import RequestError

log = logging.getLogger("fastdeploy")

MAX_NAME = 128  # characters


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """An adapter that was read: this rank's slice, and those of the others as they are sent."""

    own: Adapter
    others: list[bytes]


class Adapters:
    def __init__(
        self,
        model: ErnieModel,
        config: EngineConfig,
        requests: Mapping[str, Request],
        ranks: Ranks | None = None,
    ) -> None:
        """`requests` are those in work at any time."""
        self.config, self.network = config, model.config
        self.requests, self.ranks = requests, ranks
        self.dtype = model.model.norm.weight.dtype  # that of the weights: half the reads
        self.device = model.device
        self.by_name: dict[str, Adapter] = {}
        self.leaving: set[Adapter] = set()  # unloaded, but not yet by the other ranks
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

    def check_held(self, adapter: Adapter) -> None:
        """Raise RequestError if an adapter was unloaded, and no request had it any more: then it
        is no longer on the other ranks.
        """
        if adapter not in {*self.by_name.values(), *self.leaving}:
            raise RequestError(
                "the adapter was unloaded after this call and before its first output was asked "
                "for; load it, and call again",
                param="lora",
                status=404,
            )

    def read(self, folder: str | Path) -> Slices:
        """The adapter in a folder, ready for `add`. Raises ConfigError, CheckpointError."""
        self._check_enabled()
        max_rank = self.config.max_lora_rank
        whole = read_adapter(folder, self.network, max_rank=max_rank, dtype=self.dtype)
        size = self.ranks.size if self.ranks else 1
        own, *others = (whole.sliced(rank, size, self.network) for rank in range(size))
        return Slices(own.to(self.device), [packed_adapter(other) for other in others])

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

    def add(self, name: str, adapter: Slices) -> None:
        self.check_name(name)
        self.let_go()
        num_held = len(self._in_use() | set(self.by_name.values()))
        if num_held >= self.config.max_loras:
            raise RequestError(
                f"{num_held} adapters are in memory, as many as max_loras allows; unload one and "
                "wait until no request has it",
                status=409,
            )
        self._send(name, adapter)
        # A new dict: other threads may be reading the old one.
        own = adapter.own
        self.by_name = {**self.by_name, name: own}
        log.info("adapter %r is loaded: rank %d, %.1f MiB", name, own.rank, own.num_bytes / 2**20)

    def remove(self, name: str) -> None:
        self.leaving.add(self.get(name))
        self.by_name = {other: one for other, one in self.by_name.items() if other != name}
        self.let_go()
        log.info("adapter %r is unloaded", name)

    def let_go(self) -> None:
        """Have the other ranks forget what was unloaded and no request has any more."""
        gone = self.leaving - self._in_use()
        self.leaving -= gone
        if gone and self.ranks:
            self.ranks.call("unload_adapters", serials=[adapter.serial for adapter in gone])

    def _send(self, name: str, adapter: Slices) -> None:
        """Give the other ranks their slices. Raises RequestError, and then nobody has one."""
        if self.ranks is None:
            return
        own, others = adapter.own, adapter.others
        answers = self.ranks.call("load_adapter", data=others, serial=own.serial, rank=own.rank)
        problems = [f"rank {rank}: {said}" for rank, said in enumerate(answers, 1) if said]
        if problems:
            self.ranks.call("unload_adapters", serials=[own.serial])
            raise RequestError(
                f"the adapter {name!r} is not loaded, as not all ranks could take it "
                f"({'; '.join(problems)}); unload others, or use a smaller one",
                status=503,
            )

    def _in_use(self) -> Set[Adapter]:
        return {r.adapter for r in self.requests.values() if r.adapter is not None}

    def _check_enabled(self) -> None:
        if not self.config.enable_lora:
            raise RequestError(
                "adapters are not enabled; start with enable_lora (--enable-lora)", param="lora"
            )
