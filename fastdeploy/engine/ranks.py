"""The processes that share a model: this one is rank 0, the others are its children.

    process of the engine                      child (fastdeploy.engine.worker), one for each rank
    Ranks -------- a socket: settings, then batches and calls --------> reads and holds its slice,
    Group <======= gloo or NCCL: two sums a layer, logits to rank 0 ==> computes every batch

On its socket a child may wait for ever; inside the group nobody waits longer than PATIENCE_S. A
child whose rank 0 is gone ends. A rank 0 whose child is gone raises RankError, once and in every
later step, and ends the rest. All of it stays on this machine and on its loopback address.

A frame on a socket is one byte of kind, then its content (see `fastdeploy.engine.frames`):
    b   a batch; nothing comes back. Rows of pictures, which rank 0 alone computes, follow through
        the group
    d   data for the call that comes next
    c   a call, JSON {"name", "arguments"}; the answer is JSON {"value"} or {"error"}

Legend: R rows, C columns of a rank, V = size * C vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ernie.fused import Shard
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import Batch
from fastdeploy.engine.frames import packed
from fastdeploy.errors import RankError

PATIENCE_S = 120  # a rank that is silent for so long inside a step or a call is taken for dead
GRACE_S = 3  # from a broken connection to the exit status that explains it; and to end in order


class Group:
    """What joins the slices' results: gloo on a CPU, NCCL on GPUs.

    Not the global group of torch.distributed, which is the calling program's.
    """

    def __init__(self, rank: int, size: int, device: torch.device, folder: str) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.folder = folder  # where the ranks meet; nobody else may write there
        self.backend: Any = None  # torch's stubs do not know what its groups can do

    @property
    def shard(self) -> Shard:
        """The slice of this rank; usable before `connect`, as long as nothing is computed."""
        return Shard(self.rank, self.size, self.sum_ranks, self.join_columns)

    def connect(self) -> None:
        """Meet the other ranks; returns when all are there."""
        store = dist.FileStore(os.path.join(self.folder, "group"), self.size)
        patience = timedelta(seconds=PATIENCE_S)
        store.set_timeout(patience)
        kind: Any = dist.ProcessGroupNCCL if self.device.type == "cuda" else dist.ProcessGroupGloo
        options = kind.Options() if self.device.type == "cuda" else kind._Options()
        options._timeout = patience
        if self.device.type != "cuda":
            options._devices = [kind.create_device(hostname="127.0.0.1")]
        self.backend = kind(store, self.rank, self.size, options)
        self.sum_ranks(torch.zeros(1, device=self.device))

    def sum_ranks(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits on each of them."""
        self.backend.allreduce([x]).wait()
        return x

    def receive(self, x: Tensor) -> Tensor:
        """What rank 0 has in its `x`, in place."""
        self.backend.broadcast(x, 0).wait()
        return x

    def join_columns(self, x_RC: Tensor) -> Tensor:
        """Columns of all ranks side by side, `(R, V)`, on rank 0; the others keep their own."""
        parts = [torch.empty_like(x_RC) for _ in range(self.size)] if self.rank == 0 else []
        self.backend.gather([parts] if parts else [], [x_RC]).wait()
        return torch.cat(parts, -1) if parts else x_RC


class Ranks:
    """The children, seen from rank 0; made by `start`. `links` and `processes` go by rank, from 1.

    `stop` ends them, as does the end of this object or of this process.
    """

    def __init__(
        self, group: Group, links: list[Connection], processes: list[subprocess.Popen]
    ) -> None:
        self.group, self.links, self.processes = group, links, processes
        self.size = group.size
        self.error: str | None = None  # why nothing can be computed any more
        self.stop = weakref.finalize(
            self, _stop, links, processes, group.folder, torch.get_num_threads()
        )

    @classmethod
    def start(cls, config: EngineConfig, device: torch.device) -> Ranks:
        """Start the children, which begin to read their slices; see `connect`."""
        size = config.tensor_parallel_size
        folder = tempfile.mkdtemp(prefix="fastdeploy-")
        ranks = cls(Group(0, size, rank_device(device, 0), folder), [], [])
        # Each rank computes all the time, so they share the cores.
        num_threads = max(1, torch.get_num_threads() // size)
        torch.set_num_threads(num_threads)
        for rank in range(1, size):
            process, link = _started_worker()
            ranks.processes.append(process)
            ranks.links.append(link)
            settings = {
                "rank": rank,
                "config": dataclasses.asdict(config),
                "device": str(rank_device(device, rank)),
                "folder": folder,
                "num_threads": num_threads,
                "parent": os.getpid(),
            }
            link.send_bytes(json.dumps(settings).encode())
            if device.type == "cuda":
                arguments = (process, ranks.group)
                threading.Thread(target=_abort_after, args=arguments, daemon=True).start()
        return ranks

    def connect(self) -> None:
        """Wait until every child holds its slice, however long it reads, and join the group."""
        for rank in range(1, self.size):
            self._answer(rank, patience_s=None)
        with self.watched():
            self.group.connect()

    @property
    def are_alive(self) -> bool:
        return self.error is None and all(p.poll() is None for p in self.processes)

    def send(self, batch: Batch) -> None:
        """Have the children compute a batch; call it inside `watched`, which then computes it too.

        The tensors must be in the host's memory, but for rows of pictures.
        """
        frame = b"b" + packed(batch)
        for link in self.links:
            link.send_bytes(frame)
        if batch.embeds is not None:
            self.group.receive(batch.embeds.rows_LD)

    def call(
        self, name: str, *, is_long: bool = False, data: Sequence[bytes] = (), **arguments: Any
    ) -> list[Any]:
        """Run a method of `RankWorker` in every child and return their results, by rank.

        `data` has what each child needs beside `arguments`. The group must not be used in it, as
        rank 0 only waits, for ever if it is long. Raises RankError.
        """
        frame = b"c" + json.dumps({"name": name, "arguments": arguments}).encode()
        with self.watched():
            for link, content in zip(self.links, data):
                link.send_bytes(b"d" + content)
            for link in self.links:
                link.send_bytes(frame)
        patience_s = None if is_long else PATIENCE_S
        return [self._answer(rank, patience_s) for rank in range(1, self.size)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever the ranks do together happens inside: a lost one becomes a RankError.

        After any error, Ctrl-C too, the children are ended: nobody knows how far each one came.
        """
        if self.error is not None:
            raise RankError(self.error)
        try:
            yield
            if self.group.device.type == "cuda":
                # A group that was aborted raises nothing by itself.
                torch.cuda.synchronize(self.group.device)
                if not self.are_alive:
                    raise ConnectionError("a rank ended during a step")
        except (RuntimeError, OSError) as error:
            raise self._explained(error) from error
        except BaseException as error:
            self.error = f"the ranks have been stopped by {type(error).__name__} within a step"
            self._kill()
            raise

    def _answer(self, rank: int, patience_s: float | None) -> Any:
        link = self.links[rank - 1]
        with self.watched():
            if not link.poll(patience_s):
                raise TimeoutError(f"no answer from rank {rank}")
            try:
                answer = json.loads(link.recv_bytes())
            except EOFError:
                raise ConnectionResetError(f"rank {rank} closed its socket") from None
        if "error" in answer:
            self.error = f"rank {rank} of tensor_parallel_size={self.size}: {answer['error']}"
            self._kill()
            raise RankError(self.error)
        return answer["value"]

    def _explained(self, error: Exception) -> Exception:
        """The error to raise in place of one that came out of the group or a socket."""
        # A timeout has no class of its own in gloo.
        is_silence = isinstance(error, (TimeoutError, BlockingIOError)) or "imed out" in str(error)
        until = time.monotonic() + GRACE_S
        while not (statuses := self._statuses()) and not is_silence and time.monotonic() < until:
            time.sleep(0.01)  # a connection breaks a little before its process has a status
        if statuses:
            ended = ", ".join(f"rank {rank} {status}" for rank, status in statuses.items())
            self.error = f"{ended}: tensor_parallel_size={self.size} needs all; start again"
        elif is_silence:
            self.error = (
                f"a rank of tensor_parallel_size={self.size} was silent for {PATIENCE_S} s "
                f"({error}); all are stopped: start again"
            )
        else:
            self.error = f"the ranks have been stopped by an error: {error}"
        self._kill()
        return RankError(self.error) if statuses or is_silence else error

    def _statuses(self) -> dict[int, str]:
        """How each child ended that has ended."""
        codes = {rank: p.poll() for rank, p in enumerate(self.processes, 1)}
        return {
            rank: f"was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with {code}"
            for rank, code in codes.items()
            if code is not None
        }

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.stop()


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The device of a rank: on GPUs, the ones from `device` on."""
    return torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device


def _started_worker() -> tuple[subprocess.Popen, Connection]:
    """A child that waits for its settings, and our end of its socket."""
    ours, theirs = socket.socketpair()
    # A stopped child must not hold us in a send for ever.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", PATIENCE_S, 0))
    with theirs:
        number = theirs.fileno()
        # -P: the folder we were started in is searched only if this process searches it.
        command = [sys.executable, "-P", "-m", "fastdeploy.engine.worker", str(number)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # Ctrl-C is for rank 0, which ends the others
        )
    return process, Connection(ours.detach())


def _abort_after(process: subprocess.Popen, group: Group) -> None:
    """A thread: NCCL does not notice that a peer has ended, and would keep us waiting for it."""
    process.wait()
    if group.backend is not None:
        group.backend.abort()


def _stop(
    links: list[Connection],
    processes: list[subprocess.Popen],
    folder: str,
    num_threads: int,
) -> None:
    for link in links:
        link.close()  # which a child takes as the word to end
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)  # the children do so too, if they outlive us
    torch.set_num_threads(num_threads)
