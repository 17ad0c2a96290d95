"""Checkpoints of a run that survive being killed, filled disks and flipped bits.

    output_dir/checkpoint-120/
        model.safetensors, config.json, tokenizer   (Full)   or   adapter_*   (LoRA)
        optimizer/adamw.safetensors                 AdamW's moments
        ema/                                        averaged weights, where the run keeps them
        trainer_state.json                          step, place in the data, counts, random state
        complete.json                               size and CRC-32 of each file above
    output_dir/best.json                            which checkpoint had the best evaluation
    output_dir/abandoned-checkpoint-120/            of a run that has gone back behind it

A save is written to `checkpoint-120.partial`, every file and the folder are flushed to the disk,
and only then it is renamed; a removal goes the other way: a folder with the final name is whole.
`complete.json` also tells whether it still is, so a damaged checkpoint is skipped (loudly) for the
one before. One trainer at a time writes to a folder (`locked`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError
from ernie.tokenizer import FILES

log = logging.getLogger("erniekit")

OPTIMIZER_FILE = "optimizer/adamw.safetensors"  # not among the weights, which are all read
BATCHES_FILE = "optimizer/batches.safetensors"  # what is left of a round of rollouts
STATE_FILE = "trainer_state.json"
AVERAGE_FOLDER = "ema"
BEST_FILE = "best.json"
_MARKER = "complete.json"
# In the folder of a run, what is made of its last weights.
_RESULTS = (AVERAGE_FOLDER, "export", "split_export")
_MODEL_FILES = (
    "config.json", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "reward_head/model.safetensors", *FILES,
)  # fmt: skip
# What tells the folder of a run, which writes the first of them before it trains.
_OF_A_RUN = ("about.json", f"checkpoint-*/{_MARKER}")
# What it writes beside the model, and what an evaluation does.
_RECORDS = (
    BEST_FILE, "run.yaml", "metrics.jsonl", "answers.jsonl", "rollouts.jsonl", "report.html",
)  # fmt: skip
_EVALUATION = ("held_out.jsonl", "eval_samples.jsonl", "eval_results.json")
_NAME = re.compile(r"checkpoint-(\d+)")


class DiskFull(ConfigError):
    """A file could not be written whole; what was whole before still is."""

    exit_status = 3


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in output.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_good(output: Path, last: int | None = None) -> Path | None:
    """The newest checkpoint that is whole, of the steps up to `last`; damaged ones are named in
    warnings.
    """
    for step, folder in reversed(checkpoints(output)):
        if last is not None and step > last:
            continue
        damage = what_is_wrong(folder)
        if not damage:
            return folder
        log.warning("SKIPPED the damaged checkpoint %s: %s", folder, damage)
    return None


# What a run keeps from its first step to its last.
_KEPT_SETTINGS = ("stage", "model_name_or_path", "fine_tuning")


def to_resume(
    output: Path, wanted: str | None, settings: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its trainer_state.json; None and {} to start anew.

    `wanted` names one instead of the newest, `settings` are those of the run that goes on. Raises
    ConfigError when that is damaged, or of a run of another stage, base model or `fine_tuning`.
    """
    folder = Path(wanted) if wanted else newest_good(output)
    if wanted and (damage := what_is_wrong(Path(wanted))):
        raise ConfigError(f"resume_from_checkpoint {wanted} cannot be used: {damage}")
    if folder is None:
        return None, {}
    log.info("resuming from %s", folder)
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    for key in _KEPT_SETTINGS:
        before, now = state["settings"].get(key, settings[key]), settings[key]
        is_same, moved = before == now, ""
        if key == "model_name_or_path":
            is_same = Path(before).resolve() == Path(now).resolve()
            is_same = is_same or settings["ignore_changed_inputs"]
            moved = ", or ignore_changed_inputs=true where it is the same model in another place"
        if not is_same:
            raise ConfigError(
                f"{folder} is of a run with {key}={before}, this one has {now}; give another "
                f"output_dir, or overwrite_output_dir=true{moved}"
            )
    return folder, state


def evaluated(
    output: Path, metric: str, *, greater_is_better: bool
) -> tuple[list[tuple[float, Path]], list[Path]]:
    """The values and folders of the checkpoints that were evaluated as the newest one was, the best
    one first, the earliest of equals; and those that were evaluated on something else.

    Checkpoints that were not evaluated do not count; one whose state cannot be read is told.
    """
    found = []
    for _, folder in checkpoints(output):
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            value = float(state["evaluation"][metric])
            on, settings = state.get("inputs", {}).get("evaluation"), state.get("settings", {})
        except KeyError:
            continue
        except (OSError, ValueError, TypeError):
            log.warning("SKIPPED the damaged checkpoint %s: %s", folder, what_is_wrong(folder))
            continue
        found.append((value, folder, on, settings))
    newest = found[-1][2] if found else None

    def is_alike(on: dict[str, Any] | None, settings: dict[str, Any]) -> bool:
        if newest is None or on is None:
            return newest == on
        told = settings | on  # what an older version did not tell of it, its settings do
        return all(key in told and told[key] == value for key, value in newest.items())

    alike = [
        (value, folder) for value, folder, *of in found if is_alike(*of) and math.isfinite(value)
    ]
    others = [folder for _, folder, *of in found if not is_alike(*of)]
    return sorted(alike, key=lambda pair: pair[0], reverse=greater_is_better), others


def chosen(output: Path, which: str | None) -> Path | None:
    """What to take of a run: `best`, `newest`, `ema` or a folder, its name alone where it is one of
    the run; None: the final model, else the newest checkpoint, else None.

    Raises ConfigError where what is named is not there or damaged.
    """
    if which is None:
        return output if has_model(output) else newest_good(output)
    if which == "newest":
        folder = newest_good(output)
    elif which == "best":
        folder = _best_by_pointer(output)
    else:
        is_ours = Path(which).name == which and has_model(output / which)
        folder = output / which if is_ours or which == AVERAGE_FOLDER else Path(which)
    if folder is None or not has_model(folder):
        raise ConfigError(
            f"use_checkpoint={which}, but {folder or output} holds no such model or adapter; give "
            "best (needs evaluations), newest, ema (needs ema_decay) or a folder"
        )
    sealed = (folder / _MARKER).is_file()
    if sealed and (damage := what_is_wrong(folder)):
        raise ConfigError(f"use_checkpoint={which}: {folder} cannot be used: {damage}")
    return folder


def _best_by_pointer(output: Path) -> Path | None:
    try:
        pointer = json.loads((output / BEST_FILE).read_text(encoding="utf-8"))
        return output / pointer["checkpoint"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{output / BEST_FILE} is damaged; name a checkpoint folder") from None


def has_model(folder: Path) -> bool:
    """Whether a model or an adapter lies in the folder itself."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def what_is_wrong(folder: Path) -> str:
    """Why a checkpoint cannot be trusted; the empty string when it can."""
    try:
        files = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {_MARKER}"
    except (ValueError, KeyError, TypeError):
        return f"{_MARKER} is damaged"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} has changed since it was written"
    return ""


def save(
    output: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], num_bytes: int
) -> Path:
    """Make `checkpoint-<step>`: `write(folder)` writes the large files, `num_bytes` in all.

    Raises DiskFull; what was there before is untouched.
    """
    final, partial = output / f"checkpoint-{step}", output / f"checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(output).free
    if free < num_bytes:
        raise DiskFull(
            f"a checkpoint in {output} needs {num_bytes:,} bytes and {free:,} are free; make room, "
            f"and erniekit resume {shlex.quote(str(output))} goes on from the last one"
        )
    try:
        partial.mkdir()
        write(partial)
        _write_text(partial / STATE_FILE, json.dumps(state, indent=1) + "\n")
        _seal(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"the disk of {output} ran full while a checkpoint of {num_bytes:,} bytes was "
            f"written; make room, and erniekit resume {shlex.quote(str(output))} goes on from the "
            "last one, which is intact"
        ) from None
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    partial.rename(final)
    _flush(output)
    return final


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    sums = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _checksum(path))
        for path in files
    }
    _write_text(folder / _MARKER, json.dumps({"files": sums}, indent=1) + "\n")
    _flush(folder)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, whole."""
    hidden = path.with_name(f".{path.name}.partial")
    try:
        _write_text(hidden, text)
        hidden.replace(path)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise


def replaced(output: Path) -> list[Path]:
    """Folders of models that a run removes or writes anew in the course of time."""
    made = [output / name for name in _RESULTS]
    return [output, *made, *(folder for _, folder in checkpoints(output))]


def foreign(output: Path) -> list[str]:
    """What a run would remove or write anew, in a folder that no run has written to; a run's own
    folder has none.
    """
    if any(path for name in _OF_A_RUN for path in output.glob(name)):
        return []
    patterns = (*_MODEL_FILES, *_RESULTS, *_RECORDS)
    found = {path.relative_to(output).as_posix() for name in patterns for path in output.glob(name)}
    return sorted(found | {folder.name for _, folder in checkpoints(output)})


def refuse_as_input(output: Path, paths: Iterable[str]) -> None:
    """Raises ConfigError where one of the `paths` that are read is a file that is written."""
    written = {(output / name).resolve() for name in (*_RECORDS, *_EVALUATION)}
    for path in paths:
        if Path(path).resolve() in written:
            raise ConfigError(
                f"{path} is to be read, and is a file that is written anew in output_dir={output}; "
                "move it, or give another output_dir"
            )


def remove_all(output: Path) -> None:
    """Remove the checkpoints of an earlier run, and say which."""
    if found := checkpoints(output):
        names = ", ".join(folder.name for _, folder in found)
        log.warning("overwrite_output_dir: removed from %s: %s", output, names)
    for _, folder in found:
        _remove(folder)
    (output / BEST_FILE).unlink(missing_ok=True)


def remove_results(output: Path) -> None:
    """Remove the final model, and what was made of it: they would be taken for those of the run
    that goes on.
    """
    found = [output / name for name in _RESULTS if (output / name).exists()]
    if has_model(output) or found:
        told = ["the final model"] * has_model(output) + [f"{path.name}/" for path in found]
        log.info("removed from %s, as training goes on: %s", output, ", ".join(told))
    remove_model(output)
    for path in found:
        shutil.rmtree(path)


def remove_model(folder: Path) -> None:
    """Remove the model or adapter that lies in a folder itself, what makes it one first."""
    for pattern in _MODEL_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def set_aside(output: Path, step: int) -> None:
    """Rename the checkpoints of later steps: a run that goes on from `step` has no part in them.

    Under their new names they are neither resumed nor counted, and never removed.
    """
    later = [folder for number, folder in checkpoints(output) if number > step]
    for folder in later:
        name, count = f"abandoned-{folder.name}", 1
        while (output / name).exists():
            count += 1
            name = f"abandoned-{folder.name}.{count}"
        folder.rename(output / name)
    if not later:
        return
    with contextlib.suppress(ConfigError):
        best = _best_by_pointer(output)
        if best is not None and not best.is_dir():  # the next save finds the best of the others
            (output / BEST_FILE).unlink()
    _flush(output)
    log.warning(
        "going on from step %d: the later checkpoints of %s (%s) are set aside as abandoned-*; "
        "remove them when they are not wanted",
        step, output, ", ".join(folder.name for folder in later),
    )  # fmt: skip


def prune(output: Path, limit: int | None, kept: Path | None = None, first: int = 0) -> None:
    """Remove the oldest checkpoints beyond `limit`, of those of the steps from `first` on. One that
    cannot be removed is told.

    `kept` (the best one) is never removed; it is one of the `limit`, but the newest stays too.
    """
    if not limit or limit < 0:
        return
    folders = [folder for step, folder in checkpoints(output) if step >= first]
    if kept in folders[:-limit]:
        folders.remove(kept)
        limit = max(limit - 1, 1)
    for folder in folders[:-limit]:
        with _told(f"{folder} is one more than save_total_limit"):
            _remove(folder)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Warn where a removal fails that nothing depends on."""
    try:
        yield
    except OSError as error:
        log.warning("%s, and cannot be removed: %s (%s)", what, error.strerror, error.filename)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.partial")))


# What a writer that was killed leaves: of checkpoints, of models and .gguf files (`.saving-*`), of
# merges for a moment, of repetitions, and of single weight files.
_LEFT_OVER = ("checkpoint-*.partial", ".saving-*", ".merged-*", ".replay-*", ".*.partial")


def is_passing(output: Path) -> bool:
    """Whether a folder is there for a moment only, as that of a repetition."""
    return any(output.match(pattern) for pattern in _LEFT_OVER)


def _sweep(output: Path) -> None:
    """Remove what killed writers have left in a folder that this process holds."""
    for folder in (output, *(output / name for name in _RESULTS)):
        for path in (found for pattern in _LEFT_OVER for found in folder.glob(pattern)):
            with _told(f"{path} is left of a writer that was killed"):
                if path.is_dir():
                    shutil.rmtree(path)
                elif ".safetensors." in path.name:  # small files may be another verb's, just now
                    path.unlink()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output folder, made if needed, and remove what killed writers have left there;
    raises ConfigError while another process holds it.

    The lock dies with its process, however that ends.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {output} cannot be made: {error.strerror}") from None
    try:
        opened = (output / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"output_dir {output} cannot be written to: {error.strerror} ({error.filename}); give "
            "another one"
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another run (process {file.read().strip()}) is writing to {output}; wait for it "
                "or give another output_dir"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        _sweep(output)
        yield
