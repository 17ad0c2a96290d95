"""Other homes for the numbers of a run, by name: TensorBoard, VisualDL, W&B and SwanLab.

Each is a class with `write(step, numbers)` and `close()`, made when `report_to` names it; its
package is imported only then. The last two are told to write to disk and send nothing, unless
WANDB_MODE or SWANLAB_MODE says otherwise. Numbers are named train/loss, eval/ppl and so on.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ernie.settings import ConfigError
from erniekit.config import Run

_RENAMED = {"learning_rate": "lr"}  # as ERNIEKit names it


class Sink(Protocol):
    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        _package("tensorboard")
        writer = _package("torch.utils.tensorboard").SummaryWriter
        # What a run that was resumed had written after `step` is hidden.
        self.writer = writer(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class VisualDL:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        self.writer = _package("visualdl").LogWriter(logdir=str(folder))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(tag=name, value=value, step=step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        self.run = _package("wandb").init(
            project="erniekit",
            name=run.output.resolve().name,
            dir=str(folder),
            config=run.flat(),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        self.package = _package("swanlab")
        self.package.init(
            project="erniekit",
            experiment_name=run.output.resolve().name,
            logdir=str(folder),
            config=run.flat(),
            mode=os.environ.get("SWANLAB_MODE", "offline"),
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.package.log(numbers, step=step)

    def close(self) -> None:
        self.package.finish()


_SINKS: dict[str, Callable[[Run, Path, int], Sink]] = {
    "tensorboard": TensorBoard,
    "visualdl": VisualDL,
    "wandb": WandB,
    "swanlab": SwanLab,
}


def open_sinks(run: Run, step: int) -> list[Sink]:
    """Those of `report_to`, each in a folder of its own, for a run that begins after `step`.

    Raises ConfigError for one whose package is not installed, or whose folder cannot be made.
    """
    root = Path(run.reporting.logging_dir or run.output / "logs")
    sinks: list[Sink] = []
    for name in names_of(run):
        folder = root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"report_to={name} cannot make the folder {folder} ({error.strerror}); give "
                "another logging_dir"
            ) from None
        sinks.append(_SINKS[name](run, folder, step))
    return sinks


def names_of(run: Run) -> list[str]:
    """Those of `report_to`, each once. Raises ConfigError for a package that is not installed."""
    names = [name for name in run.reporting.report_to if name != "none"]
    if "all" in names:
        return [name for name in _SINKS if importlib.util.find_spec(name) is not None]
    for name in names:
        _package(name)
    return list(dict.fromkeys(names))


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, named as they are shown."""
    named = {}
    for key, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "step" or not is_number or not math.isfinite(value):
            continue
        split, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
        named[f"{split}/{_RENAMED.get(name, name)}"] = float(value)
    return named


def _package(name: str) -> Any:
    package = name.rpartition(".")[2]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"report_to: {package} needs the Python package {error.name}, which is not installed; "
            f"pip install {package}, or leave it out"
        ) from None
