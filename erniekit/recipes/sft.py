"""Supervised fine-tuning, full or LoRA, top to bottom.

    data -> how many steps -> model -> (resume) -> loop: step, record, evaluate, save -> final model

Everything that decides the result is in `run.yaml`; everything that changes on the way is in a
checkpoint. A run that is killed at any moment and started again gives the same numbers, bit for
bit.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ernie.settings import ConfigError
from erniekit import checkpoint, memory
from erniekit.config import Run, changed, resolved, to_yaml
from erniekit.data.loader import Stream, Survey, stream, survey
from erniekit.session import Session

log = logging.getLogger("erniekit")


def run(run: Run, device: str) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    memory.map_large_tensors()
    with checkpoint.locked(run.output):
        if run.training.overwrite_output_dir:
            checkpoint.remove_all(run.output)
        checkpoint.prune(run.output, None)
        folder, state = checkpoint.to_resume(
            run.output, run.training.resume_from_checkpoint, run.model.fine_tuning
        )
        train_stream, eval_stream = _streams(run)
        num_steps = _num_steps(run, train_stream, eval_stream, state)
        checkpoint.replace_text(run.output / "run.yaml", to_yaml(run))
        log.info("settings that are not defaults (all are in %s/run.yaml):", run.output)
        log.info("%s", "\n".join(f"  {k}: {v}" for k, v in changed(run).items()))
        session = Session(run, device, num_steps, folder, state, train_stream, eval_stream)
        return session.finish() if session.train() else session.stopped_by_signal


def _streams(run: Run) -> tuple[Stream, Stream | None]:
    """The training records, and those for evaluation where there are any."""
    if not run.data.train_dataset_path:
        raise ConfigError("train_dataset_path is not set; give a .jsonl file of dialogues")
    has_eval = run.training.do_eval and run.data.eval_dataset_path
    return stream(run, "train"), stream(run, "eval") if has_eval else None


def _num_steps(
    run: Run, train_stream: Stream, eval_stream: Stream | None, state: dict[str, Any]
) -> int:
    """Steps of the whole run: given, remembered, or found by packing an epoch without training."""
    if run.training.max_steps > 0:
        return run.training.max_steps
    if "num_steps" in state:
        return state["num_steps"]
    found = survey(train_stream, run.data.max_estimate_samples)
    _tell(train_stream, found)
    if eval_stream is not None:
        _compare(found, survey(eval_stream, run.data.max_estimate_samples))
    rows_per_step = run.training.batch_size * run.training.gradient_accumulation_steps
    num_rows = found.num_rows * run.training.num_train_epochs
    if num_rows < rows_per_step:
        log.warning(
            "the data fills %.1f rows, less than the %d of one step: it is repeated",
            num_rows,
            rows_per_step,
        )
    return max(math.ceil(num_rows / rows_per_step), 1)


def _tell(source: Stream, found: Survey) -> None:
    counts = source.encoder.counts
    log.info(
        "data: %d records read of an epoch of %d, %d left out, %d dialogues cut (%d turns); an "
        "epoch is %d rows, %s tokens, %s trained; rows are %.0f %% full",
        found.num_records,
        found.epoch_size,
        found.num_bad,
        counts["dialogues cut"],
        counts["turns dropped"],
        found.num_rows,
        f"{found.num_tokens:,}",
        f"{found.num_trained:,}",
        100 * found.fill / source.data.max_seq_len,
    )


def _compare(train: Survey, held_out: Survey) -> None:
    if common := len(train.digests & held_out.digests):
        log.warning(
            "%d of %d evaluation samples are also in the training data: eval_loss will look too "
            "good",
            common,
            len(held_out.digests),
        )
