"""From a configuration to the function that trains, in this process or in several.

The row of a stage (`erniekit.config.stages`) names its module. A process that torchrun has started
is one rank; else, where more than one process is wanted (`nproc_per_node`, NNODES), this one starts
them with torchrun's agent, waits, and says how they ended.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ernie.settings import ConfigError, as_word
from erniekit.config import Run, read_run
from erniekit.config.stages import TRAINABLE
from erniekit.faults import told_in_a_sentence

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Seconds for a step and a save after SIGTERM, before the agent ends a rank.
GRACE_S = 600
SAME_TIME_S = 5


def run_training(run: Run) -> int:
    """Train (or, with do_train false, evaluate) as `run` says; returns the exit code."""
    if not run.training.do_train:
        from erniekit.recipes import evaluation

        return evaluation.evaluate_run(run)
    recipe, device = recipe_of(run), device_of(run)
    num_nodes, num_here = num_processes(run, device)
    if is_rank() or num_nodes * num_here == 1:
        return told_in_a_sentence(partial(_run_rank, run, device, recipe), run, device)
    return _run_agent(run, device, num_nodes, num_here)


def recipe_of(run: Run) -> ModuleType:
    """The module of a run's stage, which has `run` and `method`."""
    if run.stage.recipe is None:
        raise ConfigError(
            f"stage={run.model.stage} is not available yet; use {', '.join(TRAINABLE)}"
        )
    return importlib.import_module(run.stage.recipe)


def is_rank() -> bool:
    """Whether this process was started as one of a number, by torchrun or in its way."""
    has_agent = "TORCHELASTIC_RUN_ID" in os.environ
    return has_agent or int(os.environ.get("WORLD_SIZE") or 1) > 1


def ranks_here(run: Run) -> int:
    """Processes on this machine: what the launcher says, else the run; 0 where neither does."""
    told = os.environ.get("LOCAL_WORLD_SIZE") if is_rank() else None
    return int(told or run.parallel.nproc_per_node or 0)


def num_processes(run: Run, device: str) -> tuple[int, int]:
    """Machines, and processes on this one. Raises ConfigError for numbers that make no sense."""
    import torch

    text = os.environ.get("NNODES") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"NNODES={text} is not a number of machines; give 1 or more")
    if is_rank() and "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but RANK is not set; start the ranks with "
            "torchrun or nproc_per_node=N, or unset it to train in one process"
        )
    num_gpus = torch.cuda.device_count()
    here = ranks_here(run) or (num_gpus if device == "cuda" else 1)
    if device == "cuda" and here > num_gpus:
        raise ConfigError(
            f"{here} processes of this machine need a GPU each, but {num_gpus} are visible; give "
            "a smaller nproc_per_node"
        )
    return int(text), here


def refuse_ranks(verb: str) -> None:
    """Raises ConfigError in a process of torchrun: a verb that runs in one."""
    if is_rank():
        raise ConfigError(f"erniekit {verb} runs in one process; start it without torchrun")


def device_of(run: Run) -> str:
    """cpu or cuda. Raises ConfigError for a device that is not here."""
    import torch

    wanted = {"gpu": "cuda"}.get(run.training.device, run.training.device)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise ConfigError(f"device={run.training.device!r} is not known; use auto, cpu or gpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=gpu, but torch sees no GPU here; use device=cpu")
    if wanted == "cuda":
        repeatable()
    return wanted


def repeatable() -> None:
    """Make torch's operations on a GPU add in a fixed order, where it has one to offer.

    Two runs must not differ by chance. Our kernels and gathers have a fixed order anyway; what is
    left is the embedding's gradient and a few small sums of routers. Attention's backward pass in
    torch is not among them: it keeps adding as it comes.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing of ours reads what it has not written; filling costs a pass over memory each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _run_rank(run: Run, device: str, recipe: ModuleType) -> int:
    from erniekit.parallel.ranks import RankError, joined

    if is_rank() and os.environ["RANK"] != "0":
        for name in ("erniekit", "ernie"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with joined(run.parallel, device, run.way_on) as ranks:
            return recipe.run(run, device, ranks)
    except RankError as error:
        print(f"erniekit train, rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1


def _run_agent(run: Run, device: str, num_nodes: int, num_here: int) -> int:
    """Start the ranks of this machine and wait for them; returns the exit code of all.

    As in ERNIEKit, every machine runs the same command with the same NNODES, MASTER_ADDR and
    MASTER_PORT, and ranks go by order of arrival.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from erniekit.parallel import process
    from erniekit.parallel.ranks import degrees

    degrees(run.parallel, num_nodes * num_here)
    if device == "cpu":
        threads = max(len(os.sched_getaffinity(0)) // num_here, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_S))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "8080" if num_nodes > 1 else "0")
    statuses = tempfile.mkdtemp(prefix="erniekit-")
    config = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=num_here,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"join_timeout": run.parallel.ddp_timeout},
        run_id="erniekit",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=statuses),  # else in a folder that is not removed
        local_addr=address if address in ("127.0.0.1", "localhost") else None,
    )
    # It logs what `_told` says in one sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["-m", process.__name__, "train", *words_of(run)]
    os.environ[process.FOLDER_VARIABLE] = statuses  # the ranks have it from here
    try:
        elastic_launch(config, sys.executable)(*command)
        return 0
    except SignalException as error:
        return process.status_of_all(Path(statuses), error.sigval, num_here)
    except RendezvousError:
        raise ConfigError(
            f"NNODES={num_nodes} machines did not meet at MASTER_ADDR={address} "
            f"MASTER_PORT={port} within {run.parallel.ddp_timeout} s; start the same "
            "command on each of them, with the same values"
        ) from None
    except ChildFailedError as error:
        return _told(run, error)
    finally:
        shutil.rmtree(statuses)


def words_of(run: Run) -> list[str]:
    """Words for `erniekit train` that mean this run: its own, and what they do not say."""
    told = (read_run(run.words) if run.words else Run()).flat()
    more = {key: value for key, value in run.flat().items() if value != told[key]}
    return [*run.words, *(f"{key}={as_word(value)}" for key, value in more.items())]


def _told(run: Run, error: ChildFailedError) -> int:
    """Say which rank ended first, where it could not say so itself; returns its exit code."""
    start = min(failure.timestamp for failure in error.failures.values())
    early = [f for f in error.failures.items() if f[1].timestamp <= start + SAME_TIME_S]
    rank, first = min(early, key=lambda f: (_order(f[1].exitcode), f[1].timestamp))
    if first.exitcode in (2, 3):  # a mistake of the user, or a lack, which the rank has told
        return first.exitcode
    ended = f"exited with {first.exitcode}"
    if first.exitcode < 0:
        ended = f"was ended by {first.signal_name()}"
    print(
        f"erniekit train: rank {rank} {ended}; all ranks stopped, and {run.way_on} goes on "
        "from the last checkpoint",
        file=sys.stderr,
    )
    return max(first.exitcode, 1)


def _order(exitcode: int) -> int:
    """Of ranks that ended at about the same time, the cause comes first: one that was ended from
    outside, then one that failed, then those that the agent has ended for it.
    """
    if exitcode == -signal.SIGTERM:
        return 2
    return 0 if exitcode < 0 else 1
