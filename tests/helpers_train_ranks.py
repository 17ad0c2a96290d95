"""One rank of several that train runs one after the other; started by `ranks_train`.

    python -m tests.helpers_train_ranks RUNS.json

RUNS.json is a list of {"words": [...], "nan": [rank, number of a backward pass] or null}.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import init_device_mesh

from erniekit import losses, optim
from erniekit.config import Parallel, read_run
from erniekit.launch import recipe_of
from erniekit.parallel import replicated
from erniekit.parallel.ranks import degrees, joined

ROOT = Path(__file__).parents[1]
BUCKET_BYTES = 20_000  # so that tiny models have several


def ranks_train(size: int, runs: list[dict[str, Any]], folder: Path) -> None:
    """Train `runs` on `size` processes of this machine; fails with what they printed."""
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers_train_ranks", str(folder / "runs.json")],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * size, f"exit codes {codes}\n" + "\n".join(o[-3000:] for o in outputs)


class NaNAt:
    """`losses.next_token`, but call number `number` (from 1) gives a loss that is not a number."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0
        self.real = losses.next_token

    def __call__(self, *arguments: Any, **options: Any) -> losses.Loss:
        loss = self.real(*arguments, **options)
        self.calls += 1
        if self.calls == self.number:
            loss.total, loss.value = loss.total * float("nan"), loss.value * float("nan")
        return loss


@contextmanager
def state_elsewhere(is_wanted: bool) -> Iterator[None]:
    """Optimizers that are made meanwhile take another place in a CPU's memory for pinned memory
    beside a GPU, where `offload_optim` asks for it.
    """
    with (
        mock.patch.object(optim, "_on_gpu", lambda parameters: is_wanted),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
    ):
        yield


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    with joined(Parallel(ddp_timeout=60), "cpu") as joint:
        for entry in json.loads(Path(sys.argv[1]).read_text()):
            run = read_run(entry["words"])
            shape = degrees(run.parallel, joint.size)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            ranks = dataclasses.replace(joint, mesh=mesh)
            rank, number = entry.get("nan") or (None, 0)
            loss = NaNAt(number) if rank == joint.rank else losses.next_token
            start = time.monotonic()
            with (
                mock.patch.object(losses, "next_token", loss),
                mock.patch.object(replicated, "BUCKET_BYTES", BUCKET_BYTES),
                state_elsewhere(run.optimisation.offload_optim),
            ):
                assert recipe_of(run).run(run, "cpu", ranks) == 0
            print(entry["words"][-1], f"{time.monotonic() - start:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
