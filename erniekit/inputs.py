"""What a run reads, by its content: so that a resumed run goes on with what it began with.

The place in the data that a checkpoint has is one in these files, its adapter belongs to this base,
and its evaluation is of these records. Of each file its size and a digest are kept: of all bytes up
to 64 MiB, above that of 64 stretches of 1 MiB, the first and the last of the file and others evenly
between. A change elsewhere in a large file that keeps its size is not seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ernie.chat import ChatTemplate
from ernie.chat.lock import template_hash, tokenizer_hash
from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError, field_types
from ernie.tokenizer import Tokenizer
from erniekit.config import Run
from erniekit.config.methods import Preferences
from erniekit.data import tasks

_STRETCH = 1 << 20
_NUM_STRETCHES = 64


def inputs_of(run: Run, tokenizer: Tokenizer, template: ChatTemplate | None) -> dict[str, Any]:
    """Digests of the training files, the tokenizer, the chat template and the base of an adapter,
    and what it is evaluated on, for a checkpoint.
    """
    return {
        "data": [[str(path), *_digest(path)] for path in _files(run)],
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(template, tokenizer) if template is not None else None,
        "base": _base(run),
        "evaluation": _evaluation(run),
    }


def refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError where a run would go on from the checkpoint in `folder` with other inputs
    than those `before`; where a file lies does not matter.
    """
    changes = []
    for (path, *old), (there, *new) in zip(before.get("data", ()), now["data"]):
        if old != new:
            changes.append(f"{there} has {_told(new)} and {path} had {_told(old)}")
    if "data" in before and len(before["data"]) != len(now["data"]):
        changes.append(f"there are {len(now['data'])} files and were {len(before['data'])}")
    for key, name in (("tokenizer", "tokenizer"), ("template", "chat template")):
        if before.get(key, now[key]) != now[key]:
            changes.append(f"the {name} has the digest {now[key]} and had {before[key]}")
    changes += _base_changes(before.get("base"), now.get("base"))
    if changes:
        raise ConfigError(
            f"{folder} was made with other data, templates or weights ({'; '.join(changes)}): "
            "bring them back, or give another output_dir, or ignore_changed_inputs=true to go on "
            "with the new ones, at the same place of the data"
        )


def _base_changes(before: list[Any] | None, now: list[Any] | None) -> list[str]:
    """What has changed of the base model, where both know of one."""
    if not before or not now:
        return []
    files, others = ({name: values for name, *values in base} for base in (before, now))
    if files.keys() != others.keys():
        return [f"the base model has {', '.join(others)} and had {', '.join(files)}"]
    return [
        f"{name} of the base model has {_told(others[name])} and had {_told(values)}"
        for name, values in files.items()
        if others[name] != values
    ]


def _told(values: list[Any]) -> str:
    size, digest = values
    return f"{size:,} bytes with the digest {digest}"


def _base(run: Run) -> list[Any] | None:
    """The files of the weights that adapters stand beside; None for full training, whose
    checkpoints have all weights.
    """
    if not run.is_lora:
        return None
    folder = resolve(run.model.model_name_or_path)
    return [[path.name, *_digest(path)] for path in sorted(folder.glob("*.safetensors"))]


# What records and rows of an evaluation follow from, besides its files.
_EVALUATED_KEYS = (
    "eval_dataset_type", "split", "max_seq_len", "packing", "split_multi_turn",
    "num_samples_each_epoch",
)  # fmt: skip


def _evaluation(run: Run) -> dict[str, Any] | None:
    """What an evaluation is of, so that its numbers can be compared; None without one."""
    training, settings, files = run.training, run.flat(), run.data.files("eval")
    if not files or not training.do_eval or training.evaluation_strategy == "no":
        return None
    limit, size = training.max_evaluate_steps, training.batch_size
    size = run.policy.prompts_per_round if run.stage.has_rollouts else size
    return {
        "data": [list(_digest(path)) for path in _paths(files)],
        "tasks": [spec for kind, spec, _ in files if kind == tasks.KIND],
        "weights": [weight > 0 for _, _, weight in files],
        "most": max(limit, 0) * size,  # rows or prompts; 0: all
        **{key: settings[key] for key in (*_EVALUATED_KEYS, *_judging_keys(run))},
    }


def _judging_keys(run: Run) -> list[str]:
    """Settings by which answers are judged, besides the data: of another scale with others."""
    if run.stage.has_rollouts:
        return ["reward", "reward_weights", "reward_model", "answer_pattern",
                "max_completion_length"]  # fmt: skip
    return sorted(run.stage.settings & field_types(Preferences).keys() - {"ref_model_update_steps"})


def _paths(files: list[tuple[str, str, float]]) -> list[Path]:
    """The files on disk that these are read from; tasks are made, by their settings."""
    found = []
    for kind, name, _ in files:
        if kind == "indexed":
            found += [Path(f"{name}.idx"), Path(f"{name}.bin")]
        elif kind != tasks.KIND:
            found.append(Path(name))
    return found


def _files(run: Run) -> list[Path]:
    found = _paths(run.data.files("train"))
    if "pair_dataset_path" in run.stage.settings:
        found += map(Path, run.policy.pair_dataset_path)
    return found


def _digest(path: Path) -> tuple[int, str]:
    found = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        starts = list(range(0, size, _STRETCH))
        if len(starts) > _NUM_STRETCHES:
            last = size - _STRETCH
            starts = [last * n // (_NUM_STRETCHES - 1) for n in range(_NUM_STRETCHES)]
        for start in starts:
            file.seek(start)
            found.update(file.read(_STRETCH))
    return size, found.hexdigest()[:16]
