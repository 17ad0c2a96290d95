"""`erniekit resume`: go on with a run by what lies in its folder, or verify that it would.

A verification is an ordinary training run from a checkpoint, into a hidden folder, that stops after
a few steps. What it wrote is then compared with what the run itself wrote for those steps:

    metrics.jsonl            every number of every step but times and memory
    checkpoint-<step>        each tensor of each file, bit for bit; progress and random state

The certificate, `checkpoint-<step>.certificate.json`, says what was compared, by which versions,
and the first difference if there is one. On another machine, or with another number of threads,
sums may be made in another order: then a difference says that, not that the checkpoint is bad.

Refused: a folder without run.yaml, and a checkpoint after which nothing was recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, read_overrides, read_yaml
from erniekit import checkpoint, launch
from erniekit.config import Run, effects, read_values, run_from
from erniekit.metrics import METRICS_FILE
from erniekit.report import about

log = logging.getLogger("erniekit")

# Of a record: those that tell how fast it went, or what was done after the step.
_NOT_COMPARED = ("seconds", "tokens_per_second", "peak_memory_gib")
_STATE_COMPARED = ("num_steps", "num_updates", "progress", "rng")


def run_resume(words: Sequence[str]) -> int:
    """The verb: the exit code of the training, or of the verification (0 equal, 1 not)."""
    words = list(words)
    is_verifying = "--verify" in words
    words = [word for word in words if word != "--verify"]
    if not words or "=" in words[0]:
        raise ConfigError("no output folder was given; write: erniekit resume OUTPUT_DIR")
    output, overrides = Path(words[0]), read_overrides(words[1:])
    settings = output / "run.yaml"
    if not settings.is_file():
        raise ConfigError(f"{output} has no run.yaml; give the output_dir of a training run")
    if is_verifying:
        return verify(output, **_verify_options(overrides))
    values, _ = read_values([str(settings), *words[1:]])
    once = {"resume_from_checkpoint": None, "stop_after_step": None, "ignore_changed_inputs": False}
    run = run_from(
        values | once | overrides | {"output_dir": str(output), "overwrite_output_dir": False},
        str(settings),
    )
    told = (str(settings), *words[1:])
    return launch.run_training(dataclasses.replace(run, words=told))


def _verify_options(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - {"steps", "checkpoint"}):
        raise ConfigError(f"--verify has no {unknown[0]!r}; it takes steps=K and checkpoint=FOLDER")
    steps, folder = given.get("steps"), given.get("checkpoint")
    if steps is not None and not (str(steps).isdigit() and int(steps) > 0):
        raise ConfigError(f"steps={steps} is not a number of steps; give 1, 2..")
    return {
        "steps": int(steps) if steps is not None else None,
        "start": Path(folder) if folder is not None else None,
    }


def verify(output: Path, steps: int | None = None, start: Path | None = None) -> int:
    """Repeat `steps` steps after a checkpoint and compare; returns 0 if all is equal, else 1.

    Without `steps` up to the next checkpoint, or else all that were recorded.
    """
    with checkpoint.locked(output):
        records = _records(output)
        begin, start = _start(output, records, start)
        later = [(step, folder) for step, folder in checkpoint.checkpoints(output) if step > begin]
        end = begin + steps if steps else later[0][0] if later else max(records)
        alike = _before_a_change(later)
        end = min(end, alike[-1][0]) if len(alike) < len(later) else end
        later = [(step, folder) for step, folder in alike if step <= end]
        end = min(end, max(max(records), *(step for step, _ in later), begin))
        wanted = {step: record for step, record in records.items() if begin < step <= end}
        folders = dict(later)
        difference = _damage([start, *folders.values()])
        if not difference:
            difference = _replayed(output, start, end, wanted, folders)
        path = output / f"checkpoint-{begin}.certificate.json"
        certificate = _certificate(start, end, wanted, folders, difference)
        checkpoint.replace_text(path, json.dumps(certificate, indent=1) + "\n")
    if difference:
        log.error("NOT reproduced: %s (%s)", difference, path)
        return 1
    log.info(
        "reproduced: steps %d to %d from %s, %d records and %d checkpoints are equal bit for bit "
        "(%s)",
        begin + 1, end, start, len(wanted), len(folders), path,
    )  # fmt: skip
    return 0


def _records(output: Path) -> dict[int, dict[str, Any]]:
    path = output / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.endswith("}"):
            continue  # the process was killed while it wrote
        try:
            record = json.loads(line)
            found[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"line {number} of {path} is damaged, so that there is no verdict; bring the file "
                "back, or take the line out to leave its step out of the comparison"
            ) from None
    return {step: record for step, record in found.items() if step}


def _start(
    output: Path, records: dict[int, dict[str, Any]], wanted: Path | None
) -> tuple[int, Path]:
    """The checkpoint to begin with, and its step; damaged ones are not passed over."""
    known = checkpoint.checkpoints(output)
    if wanted is not None:
        known = [
            (s, f) for s, f in known if f.name == str(wanted) or f.resolve() == wanted.resolve()
        ]
        if not known:
            raise ConfigError(f"checkpoint={wanted} is not a checkpoint of {output}")
    for step, folder in reversed(known):
        if any(other > step for other in records):
            return step, folder
    raise ConfigError(
        f"no step after {wanted or 'a checkpoint of ' + str(output)} was recorded, so there is "
        "nothing to compare with; name an earlier one: checkpoint=FOLDER"
    )


def _before_a_change(later: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """The checkpoints up to the first by other settings: one run cannot repeat what follows."""
    made = [_made_by(folder) for _, folder in later]
    return [pair for pair, _ in itertools.takewhile(lambda p: p[1] == made[0], zip(later, made))]


def _made_by(folder: Path) -> Any:
    """Steps of the whole run and the settings that decide its numbers; None where damaged."""
    try:
        state = _state(folder)
        kept = {k: v for k, v in state["settings"].items() if k not in effects.HARMLESS}
        return state["num_steps"], kept
    except (OSError, ValueError, KeyError):
        return None  # told where the checkpoint is compared


def _damage(folders: list[Path]) -> str:
    for folder in folders:
        if damage := checkpoint.what_is_wrong(folder):
            return f"{folder.name}: {damage}"
    return ""


# --- the steps again ---


def _replayed(
    output: Path,
    start: Path,
    end: int,
    records: dict[int, dict[str, Any]],
    folders: dict[int, Path],
) -> str:
    """The first difference between the run and its repetition; the empty string if none."""
    hidden = Path(tempfile.mkdtemp(prefix=".replay-", dir=output))
    try:
        run = _replay(_settings(output, folders), start, hidden, end)
        launch.run_training(run)
        again = _records(hidden)
        if (last := max(again, default=0)) < max(records):
            raise ConfigError(f"the repetition was stopped at step {last}: no verdict was written")
        for step, record in records.items():
            if difference := _of_records(record, again.get(step, {})):
                return f"step {step}: {difference}"
        for folder in folders.values():
            other = hidden / folder.name
            if other.is_dir() and (difference := _of_checkpoints(folder, other)):
                return f"{folder.name}: {difference}"
        return ""
    finally:
        shutil.rmtree(hidden)


def _settings(output: Path, folders: dict[int, Path]) -> dict[str, Any]:
    """Those by which the steps after the start were made: of the next checkpoint, or the run's."""
    if not folders:
        return read_yaml(output / "run.yaml")
    state = _state(folders[min(folders)])
    return state["settings"] | {"max_steps": state["num_steps"]}


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / checkpoint.STATE_FILE).read_text(encoding="utf-8"))


def _replay(settings: dict[str, Any], start: Path, hidden: Path, end: int) -> Run:
    return run_from(
        settings
        | {
            "output_dir": str(hidden),
            "overwrite_output_dir": False,
            "resume_from_checkpoint": str(start),
            "stop_after_step": end,
            "evaluation_strategy": "no",
            "load_best_model_at_end": False,
            "report_to": [],
            "logging_dir": None,
            "answer_steps": None,
            "save_total_limit": None,
            "use_async_save": False,
            "disable_tqdm": True,
        },
        str(start),
    )


# --- differences, in words ---


def _of_records(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key, value in theirs.items():
        if key in _NOT_COMPARED or key.startswith("eval_"):
            continue
        if ours.get(key) != value:
            return f"{key} was {value!r} and is {ours.get(key)!r} now"
    return ""


def _of_checkpoints(theirs: Path, ours: Path) -> str:
    before, now = _state(theirs), _state(ours)
    for key in _STATE_COMPARED:
        if before[key] != now[key]:
            return f"{checkpoint.STATE_FILE}: {key} differs{_where(before[key], now[key])}"
    for path in sorted(theirs.rglob("*.safetensors")):
        name = path.relative_to(theirs).as_posix()
        if not (ours / name).is_file():
            return f"{name} was not written again"
        if difference := _of_tensors(path, ours / name):
            return f"{name}: {difference}"
    return ""


def _where(before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        found = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), None)
        return f" at number {found}: {before[found]} and {now[found]} now" if found else ""
    return f": {before} and {now} now"


def _of_tensors(theirs: Path, ours: Path) -> str:
    import torch
    from safetensors import safe_open

    from ernie.checkpoint.writer import as_bytes

    with safe_open(theirs, "pt") as old, safe_open(ours, "pt") as new:
        if missing := sorted(set(old.keys()) ^ set(new.keys())):
            return f"{missing[0]} is only in one of the two"
        for name in sorted(old.keys()):
            before, now = old.get_tensor(name), new.get_tensor(name)
            if before.dtype != now.dtype or before.shape != now.shape:
                return f"{name} is {now.dtype} {tuple(now.shape)} now"
            bytes_before, bytes_now = (as_bytes(t) for t in (before, now))
            if torch.equal(bytes_before, bytes_now):
                continue
            first = int((bytes_before != bytes_now).nonzero()[0]) // before.element_size()
            place = [int(i) for i in torch.unravel_index(torch.tensor(first), before.shape)]
            a, b = (float(t.reshape(-1)[first]) for t in (before, now))
            return f"{name}{place} was {a!r} and is {b!r} now"
    return ""


# --- the certificate ---


def _certificate(
    start: Path,
    end: int,
    records: dict[int, dict[str, Any]],
    folders: dict[int, Path],
    difference: str,
) -> dict[str, Any]:
    numbers = sorted({k for r in records.values() for k in r if k not in _NOT_COMPARED})
    return {
        "verdict": "not reproduced" if difference else "reproduced",
        "first_difference": difference or None,
        "checkpoint": start.name,
        "last_step": end,
        "compared": {
            "records": sorted(records),
            "numbers": [name for name in numbers if not name.startswith("eval_")],
            "checkpoints": [folder.name for folder in folders.values()],
            "state": list(_STATE_COMPARED) if folders else [],
        },
        "sha256": {
            f"{folder.name}/{path.relative_to(folder).as_posix()}": _sha256(path)
            for folder in (start, *folders.values())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "recorded_by": _recorded_by(start.parent, end),
        "verified_by": about.start(end, "resume", ["--verify", str(start.parent)]),
    }


def _recorded_by(output: Path, step: int) -> dict[str, Any] | None:
    """The start of the run that made the step."""
    starts = about.read(output).get("starts", [])
    before = [s for s in starts if s.get("step", math.inf) < step]
    return before[-1] if before else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
