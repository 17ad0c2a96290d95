"""Supervised fine-tuning, full or LoRA, top to bottom.

    data -> how many steps -> model -> (resume) -> loop: step, record, evaluate, save -> final model

Everything that decides the result is in `run.yaml`; everything that changes on the way is in a
checkpoint. A run that is killed at any moment and started again gives the same numbers, bit for
bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ernie.checkpoint.hub import resolve
from ernie.model import ErnieModel
from ernie.settings import ConfigError, listed
from erniekit import checkpoint, losses, memory
from erniekit.build import check_layers, config_of, num_groups
from erniekit.config import Data, Pictures, Run, changed, resolved
from erniekit.config.stages import STAGES
from erniekit.data.batch import Batch
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream, stream
from erniekit.data.survey import Overlap, Survey, survey
from erniekit.evaluate import eval_batches, evaluate
from erniekit.final import finish
from erniekit.fit import fitted, tell
from erniekit.inputs import inputs_of, refuse_changes
from erniekit.loop import Progress
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.plan import Degrees
from erniekit.reference import next_move
from erniekit.report.sinks import names_of
from erniekit.session import go_through
from erniekit.start import started

log = logging.getLogger("erniekit")

# Of the data, all but how it is read ahead, evaluated and reported.
_LENGTH_KEYS = {
    field.name for field in dataclasses.fields(Data) if not field.name.startswith("eval_")
} - {"dataloader_num_workers", "prefetch_factor", "max_bad_data_share", "padding"}
_LENGTH_KEYS |= {field.name for field in dataclasses.fields(Pictures)}
_LENGTH_KEYS |= {"max_steps", "num_train_epochs", "max_prompt_len", "seed"}
# Of all settings, those by which a run asks its reference about other answers or more of them.
_ASKED_KEYS = [
    *sorted(_LENGTH_KEYS - {"num_train_epochs", "max_steps"}),
    "batch_size", "gradient_accumulation_steps", "mask_out_eos_token", "ref_model_update_steps",
    "do_eval", "evaluation_strategy", "max_evaluate_steps", "eval_dataset_path",
    "eval_dataset_type", "eval_dataset_prob",
]  # fmt: skip


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
        resolve(run.model.model_name_or_path)  # fetched, if need be, before anything reads of it
        folder, state = _where_to_go_on(run, ranks)
        train_stream, eval_stream = _streams(run)
        degrees = Degrees(sharding=ranks.shards, copies=ranks.copies)
        run = fitted(run, device, degrees)
        inputs = _inputs(run, train_stream, folder, state) if ranks.is_first else {}
        found, overlap = 0, None
        if ranks.is_first and (found := _known_steps(run, state, method, ranks)):
            overlap = _watched(run, train_stream, eval_stream)
        elif ranks.is_first:
            found = _num_steps(run, train_stream, eval_stream, ranks)
        num_steps = ranks.broadcast(found)
        log.info("settings that are not defaults (all are in %s/run.yaml):", run.output)
        log.info("%s", "\n".join(f"  {k}: {v}" for k, v in changed(run).items()))
        tell(run, device, degrees)
        if ranks.is_first:
            _check_before(run, method)
        ahead = _batches_of(run, num_steps, state, train_stream, eval_stream, ranks)
        if not _takes_reference(run, method, state, ahead, ranks):
            method.prepare(ahead)
        session = started(
            run,
            device,
            num_steps=num_steps,
            resumed=folder,
            state=state,
            train_stream=train_stream,
            eval_stream=eval_stream,
            method=method,
            inputs=inputs,
            ranks=ranks,
        )
        memory.give_back()
        is_done = go_through(session)
        if overlap is not None:
            tell_overlap(overlap.met, overlap.held_out, "samples", "eval_loss")
        return finish(session) if is_done else session.signals.exit_status


def _check_before(run: Run, method: Method) -> None:
    """Raise ConfigError for what would fail later, after the method has prepared and the model is
    built: packages that are not installed, layers and numbers of an evaluation that do not exist.
    """
    names_of(run)
    check_layers(run, config_of(run.model.model_name_or_path))
    known = [f"eval_{number}" for number in run.stage.evaluated]
    if run.training.metric_for_best_model and (metric := method.metric_of(run)) not in known:
        raise ConfigError(
            f"metric_for_best_model={metric} is not a number of an evaluation; use one of "
            f"{listed(known)}"
        )


def _where_to_go_on(run: Run, ranks: Ranks) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, as rank 0 finds it, and its state; None and {} at the start."""
    folder: Path | None = None
    state: dict[str, Any] = {}
    if ranks.is_first:
        _refuse_removal(run)
        wanted = run.training.resume_from_checkpoint
        if wanted or not run.training.overwrite_output_dir:
            folder, state = checkpoint.to_resume(run.output, wanted, run.flat())
    if ranks.size > 1:
        name, state = ranks.broadcast([str(folder or ""), state])
        folder = Path(name) if name else None
    return folder, state


def _inputs(
    run: Run, train_stream: Stream, folder: Path | None, state: dict[str, Any]
) -> dict[str, Any]:
    """What the run reads, in digests: the same as before, where that is asked."""
    encoder, has_template = train_stream.encoder, run.stage.sample != "document"
    found = inputs_of(run, encoder.tokenizer, encoder.template if has_template else None)
    if folder is not None and not run.training.ignore_changed_inputs:
        refuse_changes(state.get("inputs", {}), found, folder)
    return found


def _refuse_removal(run: Run) -> None:
    """Raises ConfigError where training would remove what it begins with or reads, or what no run
    made.
    """
    training, model = run.training, run.model
    given = {"model_name_or_path": model.model_name_or_path, "lora_path": model.lora_path}
    if training.overwrite_output_dir:
        given["resume_from_checkpoint"] = training.resume_from_checkpoint
    removed = {path.resolve() for path in checkpoint.replaced(run.output)}
    for key, value in given.items():
        if value and Path(value).resolve() in removed:
            raise ConfigError(
                f"{key}={value} is what training into output_dir={run.output} replaces; give "
                "another output_dir"
            )
    checkpoint.refuse_as_input(run.output, run.data_paths)
    if found := checkpoint.foreign(run.output):
        raise ConfigError(
            f"output_dir={run.output} holds {listed(found, 'and')}, which no training run has "
            "written and training would remove; give another output_dir"
        )


def _batches_of(
    run: Run,
    num_steps: int,
    state: dict[str, Any],
    train_stream: Stream,
    eval_stream: Stream | None,
    ranks: Ranks,
) -> Iterator[Batch]:
    """Every batch that this start of the run will go through before its reference moves, those of
    evaluation last.
    """
    progress = Progress.from_dict(state["progress"]) if state else Progress()
    size = run.training.batch_size
    last = min(num_steps, run.training.stop_after_step or num_steps)
    if (every := run.preferences.ref_model_update_steps) > 0:  # later ones are asked on the way
        last = min(last, next_move(every, progress.step))
        if last == progress.step:
            return
    num_left = (last - progress.step) * run.training.gradient_accumulation_steps * ranks.size
    yield from islice(train_stream.batches(size, progress.cursor), max(num_left, 0))
    if eval_stream is not None and run.training.evaluation_strategy != "no":
        yield from eval_batches(run, eval_stream)


def _takes_reference(
    run: Run, method: Method, state: dict[str, Any], ahead: Iterable[Batch], ranks: Ranks
) -> bool:
    """Whether the checkpoint has a reference that has moved; raises ConfigError where it knows less
    than the batches ahead ask for.
    """
    if method.reference is None:
        return False
    method.reference.load_state(state.get("reference", {}))
    if not method.reference.is_moved:
        return False
    if method.reference.lacks(ahead):
        raise ConfigError(_told_of_reference(run, state, ranks.size))
    return True


def _told_of_reference(run: Run, state: dict[str, Any], num_ranks: int) -> str:
    """What a moved reference does not know because of which settings, and what would be right."""
    now = run.flat()
    before = now | state["settings"]
    changed = [f"{k} {before[k]} -> {now[k]}" for k in _ASKED_KEYS if before[k] != now[k]]
    if (ranks := state.get("ranks", 1)) != num_ranks:
        changed.append(f"{ranks} -> {num_ranks} processes")
    key, step = "ref_model_update_steps", state["progress"]["step"]
    what = ", ".join(changed) or "more steps, or other data"
    told = (
        f"the checkpoint of step {step} has the numbers of a reference that has moved up to its "
        f"next move, and this run asks for others ({what}): give "
    )
    if now[key] <= 0:
        return f"{told}{key}={before[key]}, as before"
    both = math.lcm(max(before[key], 1), now[key])
    move = next_move(both, step)
    return (
        f"{told}the same up to step {move} (stop_after_step={move}), where it moves, or go on from "
        f"a checkpoint of a multiple of {both} steps"
    )


def _streams(run: Run) -> tuple[Stream, Stream | None]:
    """The training records, and those for evaluation where there are any."""
    if not run.data.files("train"):
        raise ConfigError("train_dataset_path is not set; give a .jsonl file of records")
    has_eval = run.training.do_eval and run.data.files("eval")
    train_stream = stream(run, "train")
    tokenizer = train_stream.encoder.tokenizer
    return train_stream, stream(run, "eval", tokenizer) if has_eval else None


def _known_steps(run: Run, state: dict[str, Any], method: Method, ranks: Ranks) -> int:
    """Steps of the whole run: given, counted by the method, or remembered while nothing that they
    follow from has changed; else 0.
    """
    if run.training.max_steps > 0:
        return run.training.max_steps
    if method.count_steps is not None:
        return method.count_steps()
    length = _length_of(run.flat(), ranks.size)
    if state and _length_of(state["settings"], state.get("ranks", 1)) == length:
        return state["num_steps"]
    return 0


def _watched(run: Run, train_stream: Stream, eval_stream: Stream | None) -> Overlap | None:
    """What compares the training samples with those held out, as they are read; None where nothing
    is held out, or rounds compare prompts.
    """
    if eval_stream is None or run.stage.has_rollouts:
        return None
    try:
        held_out = survey(eval_stream.again(), run.data.max_estimate_samples)
    except DataError:  # told by the evaluation
        return None
    train_stream.on_read = overlap = Overlap(held_out.digests)
    return overlap


def _num_steps(run: Run, train_stream: Stream, eval_stream: Stream | None, ranks: Ranks) -> int:
    """Steps of the whole run, found by packing an epoch without training."""
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


def _length_of(settings: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """What the number of steps follows from: settings, and rows of a step."""
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"] * num_ranks
    keys = _LENGTH_KEYS - ({"max_prompt_len"} - STAGES[settings["stage"]].settings)
    return {key: settings.get(key) for key in keys} | {"rows": rows}


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
