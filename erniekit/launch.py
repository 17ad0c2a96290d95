"""From a configuration to the function that trains: this process, one device.

`RECIPES` names the module of each stage. Several processes (NNODES, torchrun) are refused: a run
that silently trained four copies would be worse than none.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from ernie.settings import ConfigError
from erniekit.config import Run

RECIPES = {"SFT": "erniekit.recipes.sft", "DPO": "erniekit.recipes.preference"}


def run_training(run: Run) -> int:
    """Train (or, with do_train false, evaluate) as `run` says; returns the exit code."""
    if not run.training.do_train:
        from erniekit.recipes import evaluation

        return evaluation.evaluate_run(run)
    return recipe_of(run).run(run, device_of(run))


def recipe_of(run: Run) -> ModuleType:
    """The module of a run's stage, which has `run` and `method`."""
    stage = run.model.stage
    if stage not in RECIPES:
        raise ConfigError(f"stage={stage} is not available yet; use {' or '.join(RECIPES)}")
    return importlib.import_module(RECIPES[stage])


def device_of(run: Run) -> str:
    """cpu or cuda. Raises ConfigError for a device or a number of processes that is not here."""
    import torch

    for variable in ("NNODES", "WORLD_SIZE"):
        if os.environ.get(variable, "1") not in ("", "1"):
            raise ConfigError(
                f"{variable}={os.environ[variable]} asks for several processes, which are not "
                "available yet; unset it to train in one"
            )
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
