"""Supervised fine-tuning, full or LoRA, top to bottom.

    data -> how many steps -> model -> (resume) -> loop: step, record, evaluate, save -> final model

Everything that decides the result is in `run.yaml`; everything that changes on the way is in a
checkpoint. A run that is killed at any moment and started again gives the same numbers, bit for
bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit import checkpoint, losses, memory
from erniekit.build import num_groups
from erniekit.config import Run, changed, resolved, to_yaml
from erniekit.data.batch import Batch
from erniekit.data.stream import Stream, stream
from erniekit.data.survey import Survey, survey
from erniekit.evaluate import eval_batches, evaluate
from erniekit.final import finish
from erniekit.loop import Progress
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.session import go_through
from erniekit.start import started

log = logging.getLogger("erniekit")


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    return train(run, device, method(run, device), ranks)


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The next-token loss, and its value on held-out data."""
    del device, is_kept  # nothing is computed before training
    chunk_size = run.model.loss_subbatch_seqlen
    loss = partial(losses.next_token, chunk_size=chunk_size, terms=terms(run))
    return Method(loss, partial(evaluate, chunk_size=chunk_size), measure=partial(_measure, run))


def _measure(run: Run, model: ErnieModel, window: Sequence[Batch], ranks: Ranks) -> dict[str, Any]:
    del model, ranks
    budget = len(window) * run.training.batch_size * run.data.max_seq_len
    return losses.balanced(window, run.model.token_balance_loss, budget)


def terms(run: Run) -> losses.Terms:
    """What is added to the loss; the router is only trained along with everything else."""
    model, full = run.model, not run.is_lora
    return losses.Terms(
        load_balance=model.moe_aux_loss_lambda * full,
        orthogonal=model.moe_orthogonal_loss_lambda
        * (full and model.moe_orthogonal_update == "loss"),
        z=model.moe_z_loss_lambda * full,
        multi_token=model.multi_token_pred_lambda if model.num_nextn_predict_layers else 0.0,
        balance=model.token_balance_loss,
        num_groups=num_groups(run),
    )


def train(run: Run, device: str, method: Method, ranks: Ranks) -> int:
    """Train a `resolved` run by a method; what every recipe shares. Rank 0 decides and writes."""
    memory.keep_large_tensors(torch.device(device))
    with checkpoint.locked(run.output) if ranks.is_first else contextlib.nullcontext():
        folder, state = _where_to_go_on(run, ranks)
        train_stream, eval_stream = _streams(run)
        found = _num_steps(run, train_stream, eval_stream, state, ranks) if ranks.is_first else 0
        num_steps = ranks.told(found)
        if ranks.is_first:
            checkpoint.replace_text(run.output / "run.yaml", to_yaml(run))
        log.info("settings that are not defaults (all are in %s/run.yaml):", run.output)
        log.info("%s", "\n".join(f"  {k}: {v}" for k, v in changed(run).items()))
        method.prepare(_batches_of(run, num_steps, state, train_stream, eval_stream, ranks))
        session = started(
            run, device, num_steps, folder, state, train_stream, eval_stream, method, ranks
        )
        memory.give_back()
        return finish(session) if go_through(session) else session.signals.exit_status


def _where_to_go_on(run: Run, ranks: Ranks) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, as rank 0 finds it, and its state; None and {} at the start."""
    folder: Path | None = None
    state: dict[str, Any] = {}
    if ranks.is_first:
        if run.training.overwrite_output_dir:
            checkpoint.remove_all(run.output)
        checkpoint.prune(run.output, None)
        folder, state = checkpoint.to_resume(
            run.output, run.training.resume_from_checkpoint, run.model.fine_tuning
        )
    if ranks.size > 1:
        name, state = ranks.told([str(folder or ""), state])
        folder = Path(name) if name else None
    return folder, state


def _batches_of(
    run: Run,
    num_steps: int,
    state: dict[str, Any],
    train_stream: Stream,
    eval_stream: Stream | None,
    ranks: Ranks,
) -> Iterator[Batch]:
    """Every batch that this start of the run will go through, those of evaluation last."""
    progress = Progress.from_dict(state["progress"]) if state else Progress()
    size = run.training.batch_size
    last = min(num_steps, run.training.stop_after_step or num_steps)
    if (every := run.preferences.ref_model_update_steps) > 0:  # later ones are asked on the way
        last = min(last, every)
    num_left = (last - progress.step) * run.training.gradient_accumulation_steps * ranks.size
    yield from islice(train_stream.batches(size, progress.cursor), max(num_left, 0))
    if eval_stream is not None and run.training.evaluation_strategy != "no":
        yield from eval_batches(run, eval_stream)


def _streams(run: Run) -> tuple[Stream, Stream | None]:
    """The training records, and those for evaluation where there are any."""
    if not run.data.files("train"):
        raise ConfigError("train_dataset_path is not set; give a .jsonl file of records")
    has_eval = run.training.do_eval and run.data.files("eval")
    train_stream = stream(run, "train")
    tokenizer = train_stream.encoder.tokenizer
    return train_stream, stream(run, "eval", tokenizer) if has_eval else None


def _num_steps(
    run: Run,
    train_stream: Stream,
    eval_stream: Stream | None,
    state: dict[str, Any],
    ranks: Ranks,
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
    rows_per_step = run.training.batch_size * run.training.gradient_accumulation_steps * ranks.size
    num_rows = found.num_rows * run.training.num_train_epochs
    if num_rows < rows_per_step:
        log.warning(
            "the data fills %.1f rows, less than the %d of one step: it is repeated",
            num_rows,
            rows_per_step,
        )
    return max(math.ceil(num_rows / rows_per_step), 1)


def _tell(source: Stream, found: Survey) -> None:
    counts, cut = source.encoder.counts, ""
    if "dialogues cut" in counts:  # documents are never
        cut = f", {counts['dialogues cut']} dialogues cut ({counts['turns dropped']} turns)"
    log.info(
        "data: %d records read of an epoch of %d, %d left out%s; an epoch is %d rows, %s tokens, "
        "%s trained; rows are %.0f %% full",
        found.num_records,
        found.epoch_size,
        found.num_bad,
        cut,
        found.num_rows,
        f"{found.num_tokens:,}",
        f"{found.num_trained:,}",
        100 * found.fill / source.data.max_seq_len,
    )


def _compare(train: Survey, held_out: Survey) -> None:
    tell_overlap(train.digests & held_out.digests, held_out.digests, "samples", "eval_loss")


def tell_overlap(common: Sized, asked: Sized, kind: str, number: str) -> None:
    """Warn of held-out samples or prompts that are trained on."""
    if common:
        log.warning(
            "%d of %d evaluation %s are also in the training data: %s will look too good",
            len(common),
            len(asked),
            kind,
            number,
        )
