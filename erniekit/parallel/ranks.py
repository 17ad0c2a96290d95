"""The processes of a run, seen from one of them: who it is, and what the ranks agree on.

    mesh    replicate x shard, rank = replica * shards + shard

All ranks walk through the same stream of batches and each computes every `size`-th of a window, so
counts and the place in the data need no exchange. What does, goes as few small tensors over gloo;
weights and gradients go over gloo on CPUs and NCCL on GPUs (`replicated`, `sharded`).

Rank 0 alone writes files and talks. Nobody waits longer than `ddp_timeout` seconds for another.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ernie.settings import ConfigError
from erniekit.config import Parallel
from erniekit.parallel.watch import Watch

log = logging.getLogger("erniekit")
T = TypeVar("T")

GRACE_S = 3  # a rank that fails lets rank 0, which may have the same to say, say it first


class RankError(RuntimeError):
    """A rank has ended or is silent; the message names it."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes. The default is a process by itself, for which nothing is exchanged.

    `mesh` has the axes "replicate" and "shard".
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Over how many ranks one copy of what is sharded lies."""
        return self.mesh["shard"].size() if self.mesh is not None else 1

    @property
    def copies(self) -> int:
        """How many ranks hold the same shard."""
        return self.size // self.shards

    def own(self, window: Sequence[T]) -> Sequence[T]:
        """This rank's share of something that all ranks have in the same order."""
        return window[self.rank :: self.size]

    def all_reduce(self, values: list[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks: integers exactly, numbers in float64."""
        if self.size == 1 or not values:
            return values
        device = values[0].device  # from which all go to the host at once
        flat = torch.cat([v.detach().reshape(-1).to(device, torch.float64) for v in values]).cpu()
        dist.all_reduce(flat)
        parts = flat.split([v.numel() for v in values])
        return [
            part.view(v.shape).to(v.device, part.dtype if v.is_floating_point() else v.dtype)
            for part, v in zip(parts, values)
        ]

    def all_reduce_max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has as `value`, which must fit into JSON; the others' is ignored."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        content = torch.zeros(self.all_reduce_max(len(text)), dtype=torch.uint8)
        if self.is_first:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return json.loads(content.numpy().tobytes())

    def all_gather(self, value: Any) -> list[Any]:
        """What each rank has as `value`, which must fit into JSON, in the order of the ranks."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        text = text.ljust(self.all_reduce_max(len(text)))  # blanks after it mean nothing
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [json.loads(content.numpy().tobytes()) for content in found]

    def report_step(self, step: int) -> None:
        """Let the others know how far this rank is, should it be missed."""
        if self.watch is not None:
            self.watch.step = step

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.all_reduce_max(0)


ALONE = Ranks()


def degrees(parallel: Parallel, size: int) -> tuple[int, int]:
    """Copies, and shards of each, of a run on `size` processes; raises ConfigError.

    As in ERNIEKit, -1 takes what is left, and a `sharding_parallel_degree` without `sharding` is
    that of stage1.
    """
    given_shards, given_copies = parallel.sharding_parallel_degree, parallel.data_parallel_degree
    if parallel.sharding is None:
        shards = max(given_shards, 1)
    elif given_shards > 0:
        shards = given_shards
    else:
        shards = max(size // max(given_copies, 1), 1)
    copies = given_copies if given_copies > 0 else max(size // shards, 1)
    if copies * shards != size:
        raise ConfigError(
            f"data_parallel_degree={given_copies} and sharding_parallel_degree={given_shards} make "
            f"{copies} x {shards} ranks, but there are {size}; leave one of them at -1, or start "
            f"{copies * shards} processes"
        )
    return copies, shards


@contextlib.contextmanager
def joined(parallel: Parallel, device: str, way_on: str = "the same command") -> Iterator[Ranks]:
    """This process as one of those that torchrun's variables tell of; `ALONE` without them.

    Within, the loss of another rank becomes a RankError, which says by which `way_on` to go on.
    Raises ConfigError for degrees that do not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    copies, shards = degrees(parallel, size)
    if size == 1:
        yield ALONE
        return
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code tells where its rank was
    patience = timedelta(seconds=parallel.ddp_timeout)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=patience)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=patience,
    )
    watch = Watch(store, rank, size, parallel.ddp_timeout, way_on)
    try:
        mesh = init_device_mesh(device, (copies, shards), mesh_dim_names=("replicate", "shard"))
        with watch, _explained(watch):
            ranks = Ranks(rank, size, mesh, watch)
            yield ranks
            ranks.barrier()
        dist.destroy_process_group()
    finally:
        watch.close()


@contextlib.contextmanager
def _explained(watch: Watch) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_of_group(error):
            watch.leave(f"stopped by {type(error).__name__}: {error}")
            if watch.rank:  # all ranks fail alike where the settings or the data are wrong
                time.sleep(GRACE_S)
                log.error("rank %d stopped by %s: %s", watch.rank, type(error).__name__, error)
            raise
        found = watch.missing()
        watch.leave(f"stopped because {found}")
        raise RankError(f"{found}; all ranks stop, and {watch.way_on} goes on") from error


def _is_of_group(error: Exception) -> bool:
    """Whether an exchange between ranks failed; gloo's errors have no class of their own."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    is_gloo = any(words in str(error) for words in ("gloo", "pair closure"))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and is_gloo)
