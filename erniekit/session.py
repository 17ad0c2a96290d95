"""A run while it goes on: its parts, the steps, and what happens after each of them.

A `Session` is state: `start.started` makes it, the functions here go through the steps with it, and
`final.finish` writes the model that it leaves behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ernie.model import ErnieModel
from ernie.settings import ConfigError, listed
from erniekit import checkpoint, debug, metrics, snapshot
from erniekit.average import Average
from erniekit.build import num_groups
from erniekit.config import Run
from erniekit.data.batch import Batch
from erniekit.data.prefetch import prefetched
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.dropout import Dropout
from erniekit.evaluate import eval_batches
from erniekit.gradients import Gradients
from erniekit.loop import Orthogonal, Parts, Progress, TooManySkipped, TrainingError, train
from erniekit.method import Method
from erniekit.optim import AdamW
from erniekit.parallel.ranks import Ranks
from erniekit.report.reporter import Reporter
from erniekit.saver import Saver
from erniekit.signals import CaughtSignals

if TYPE_CHECKING:
    from erniekit.parallel.forms import Form

log = logging.getLogger("erniekit")

# A file of this name in output_dir asks for a checkpoint after the step; it is then removed.
REQUEST_FILE = "SAVE"


@dataclass
class Session:
    """What a run consists of on one rank, and where it is; `parameters` are those of the model by
    name, `trained` the ones that move.
    """

    run: Run
    device: str
    num_steps: int
    train_stream: Stream
    eval_stream: Stream | None
    method: Method
    inputs: dict[str, Any]  # digests of what is read; on rank 0
    ranks: Ranks
    form: Form
    model: ErnieModel
    dropout: Dropout
    parameters: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter]
    gradients: Gradients
    optimizer: AdamW
    average: Average | None
    progress: Progress
    reporter: Reporter
    first_step: int  # of this start, counted from 1
    signals: CaughtSignals = field(default_factory=CaughtSignals)
    is_stopped: bool = False  # by any rank
    hears_requests: bool = True  # of files
    unsaved: dict[str, Any] | None = None  # the record of the last step, until a checkpoint has it
    told_apart: set[str] = field(default_factory=set)  # checkpoints of another evaluation

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations; 0 for never."""
        t = self.run.training
        if self.eval_stream is None:
            return 0
        return t.interval(t.evaluation_strategy, t.eval_steps or 500, self.num_steps)

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints; 0 for never."""
        t = self.run.training
        return t.interval(t.save_strategy, t.save_steps, self.num_steps)

    @property
    def metric(self) -> str:
        """The number that says which checkpoint is best."""
        return self.method.metric_of(self.run)


def go_through(session: Session) -> bool:
    """The steps that are left; True when the last one is done, False when it was stopped before."""
    if _is_stopped(session) and session.progress.step < session.num_steps:
        tell_nothing_trained(session, f"stop_after_step={session.run.training.stop_after_step}")
        return False
    if not session.progress.step:
        if session.eval_every:
            session.reporter.write({"step": 0, **_evaluated(session, 0)})
        session.reporter.answer(0)
    run, encoder, batches = session.run, session.train_stream.encoder, _batches(session)
    saver = Saver(
        run.output,
        lambda folder, tensors: snapshot.write(run, session.model, encoder, tensors, folder),
        partial(_saved, session),
        is_async=run.training.use_async_save,
    )
    after_step = partial(_after_step, session, saver)
    try:
        with CaughtSignals() as session.signals, contextlib.closing(session.reporter), saver:
            try:
                with contextlib.closing(batches):
                    train(_parts(session), batches, session.progress, after_step)
            except (DataError, RoundError) as error:
                # Between two steps. Bad data is seen by all ranks alike; a round may fail in one of
                # them, and a save needs all.
                is_of_all = isinstance(error, DataError) or session.ranks.size == 1
                if session.unsaved is not None and is_of_all:
                    _save(session, saver, session.unsaved)
                raise
    except TooManySkipped as error:
        if not session.ranks.is_first:
            raise
        folder = debug.write_bundle(run, session.train_stream, error.last)
        way = _way_back(session)
        raise TrainingError(f"{error}; what led to it is in {folder}; {way}") from None
    return not session.is_stopped or session.progress.step == session.num_steps


def tell_nothing_trained(session: Session, asked: str) -> None:
    """The last line of a start that asks for steps which have all been done."""
    log.warning(
        "nothing was trained in this start: the run has done %d steps, and %s was asked for; more "
        "steps go on, overwrite_output_dir=true or another output_dir trains anew",
        session.progress.step, asked,
    )  # fmt: skip


def _is_stopped(session: Session) -> bool:
    """Whether a signal or stop_after_step ends the run before its last step."""
    last = session.run.training.stop_after_step
    return session.signals.caught or (last is not None and session.progress.step >= last)


class RoundError(ConfigError):
    """What ended a round of answers, before the next step: a reward or a server that has failed."""


def _told(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    try:
        yield from batches
    except ConfigError as error:
        raise RoundError(str(error)) from error


def _batches(session: Session) -> Generator[Batch, None, None]:
    """Those of training, from the place in the data on: made by the model, or read ahead."""
    run, source = session.run, session.method.source
    if source is not None:
        return _told(source.batches(session.model, session.progress, session.num_steps))
    accumulated = run.training.gradient_accumulation_steps * session.ranks.size
    return prefetched(
        session.train_stream.batches(run.training.batch_size, session.progress.cursor),
        run.data.prefetch_factor * accumulated if run.data.dataloader_num_workers else 0,
    )


def _way_back(session: Session) -> str:
    """How to go on from before the skipped steps in a row, whose weights may be spoilt."""
    folder = checkpoint.newest_good(session.run.output, session.progress.last_taken)
    if folder is None:
        return "no checkpoint is from before it: overwrite_output_dir=true starts anew"
    return f"resume_from_checkpoint={folder}, or an earlier one, goes on from before it"


def _parts(session: Session) -> Parts:
    """What the loop drives."""
    run, form, gradients = session.run, session.form, session.gradients
    return Parts(
        model=session.model,
        loss=partial(session.method.loss, gradients=gradients if form.straight_into_sums else None),
        optimizer=session.optimizer,
        gradients=gradients,
        optimisation=run.optimisation,
        num_steps=session.num_steps,
        batches_per_step=run.training.gradient_accumulation_steps,
        epoch_size=session.train_stream.epoch_size,
        training=run.training,
        bias_step=run.bias_step,
        orthogonal=_orthogonal(run),
        ranks=session.ranks,
        after_update=partial(form.after_update, session.trained),
        average=session.average,
        measure=partial(_measured, session),
        dropout=session.dropout,
    )


def _orthogonal(run: Run) -> Orthogonal | None:
    """The decoupled update of routers, where it is wanted."""
    model = run.model
    weight = model.moe_orthogonal_loss_lambda
    if run.is_lora or not weight or model.moe_orthogonal_update == "loss":
        return None
    return Orthogonal(weight, model.moe_orthogonal_update == "decoupled_lr", num_groups(run))


def _measured(session: Session, window: list[Batch]) -> dict[str, Any]:
    """What the loss must know of a step; before it, the reference moves where it is due."""
    step, reference = session.progress.step, session.method.reference
    if reference is not None and step and reference.every and step % reference.every == 0:
        reference.move(session.model, _batches_ahead(session, reference.every))
    return session.method.measure(session.model, window, session.ranks)


def _batches_ahead(session: Session, num_steps: int) -> Iterator[Batch]:
    """Those of the next steps, as if the run had no end, and those of an evaluation."""
    training = session.run.training
    count = num_steps * training.gradient_accumulation_steps * session.ranks.size
    again = session.train_stream.again()
    yield from islice(again.batches(training.batch_size, session.progress.cursor), count)
    if session.eval_every:
        assert session.eval_stream is not None
        yield from eval_batches(session.run, session.eval_stream)


def _after_step(session: Session, saver: Saver, record: dict[str, Any]) -> bool:
    """Tell, evaluate and save where it is due; True where the run is to stop here."""
    step, ranks = record["step"], session.ranks
    is_last = step == session.num_steps
    saver.settle()
    session.unsaved = record
    session.reporter.tell(record)
    if session.eval_every and (step % session.eval_every == 0 or is_last):
        session.unsaved = record = record | _evaluated(session, step)
    session.reporter.write(record)
    request = session.run.output / REQUEST_FILE
    # Rank 0 sees the request, and a signal comes to each in its own time: all do the same.
    is_there = ranks.is_first and session.hears_requests and request.exists()
    is_asked = bool(ranks.all_reduce_max(is_there))
    is_due = bool(session.save_every) and (is_last or step % session.save_every == 0)
    # Asked once: a signal may come at any moment.
    session.is_stopped = bool(ranks.all_reduce_max(_is_stopped(session)))
    if is_due or is_asked or session.is_stopped:
        _save(session, saver, record)
    if is_asked and ranks.is_first:
        saver.settle(wait=True)
        _answer(session, request)
    return session.is_stopped


def _answer(session: Session, request: Path) -> None:
    """Take the request away; one that stays would ask after every step, and is heard no more."""
    try:
        request.unlink(missing_ok=True)
    except OSError as error:
        session.hears_requests = False
        log.warning(
            "%s has asked for a checkpoint and cannot be removed (%s): no other request is heard "
            "in this start",
            request, error.strerror,
        )  # fmt: skip


def _evaluated(session: Session, step: int) -> dict[str, float]:
    assert session.eval_stream is not None
    batches = eval_batches(session.run, session.eval_stream)
    values = session.method.evaluate(session.model, batches, ranks=session.ranks)
    log.info("%s", metrics.eval_line(values, step))
    if session.metric not in values:
        raise ConfigError(
            f"metric_for_best_model={session.metric} is not a number of an evaluation; use one of "
            f"{', '.join(values)}"
        )
    return values


# --- saving ---


def _save(session: Session, saver: Saver, record: dict[str, Any]) -> None:
    """Write a checkpoint of this moment, after a step with this record."""
    state = {
        "num_steps": session.num_steps,
        "num_updates": session.optimizer.num_updates,
        "progress": session.progress.to_dict(),
        "rng": torch.get_rng_state().tolist(),
        "evaluation": {k: v for k, v in record.items() if k.startswith("eval_")},
        "settings": session.run.flat(),
        "inputs": session.inputs,
        "ranks": session.ranks.size,
    }
    if session.method.reference is not None:
        state["reference"] = session.method.reference.state()
    tensors = tensors_of(session)
    session.unsaved = None
    if session.ranks.is_first:
        saver.save(session.progress.step, tensors, state)
    session.ranks.barrier()


def tensors_of(session: Session) -> dict[str, Tensor]:
    """As `snapshot.taken`, of all that the run has."""
    kept = session.trained if session.run.is_lora else session.parameters
    source = session.method.source
    batches = source.tensors() if source else {}
    return snapshot.taken(session.form, kept, session.optimizer, batches)


def _saved(session: Session, folder: Path) -> None:
    """A checkpoint is whole: see which is the best now, and drop the oldest ones."""
    output, best = session.run.output, next(iter(evaluated(session)), None)
    if best is not None:
        pointer = {"checkpoint": best[1].name, session.metric: best[0]}
        checkpoint.replace_text(output / checkpoint.BEST_FILE, json.dumps(pointer) + "\n")
    limit, progress = session.run.training.save_total_limit, session.progress
    # While steps are skipped, what was saved before them may be the last that is worth anything.
    first = progress.last_taken + 1 if progress.skipped_in_a_row else 0
    checkpoint.prune(output, limit, best[1] if best is not None else None, first)
    session.reporter.write_page()
    log.info("saved %s", folder)


def evaluated(session: Session) -> list[tuple[float, Path]]:
    """The checkpoints so far that were evaluated on the same, the best one first, with the numbers
    that say so; others are told, once.
    """
    greater = session.run.training.greater_is_better
    if greater is None:
        greater = not session.metric.endswith(("loss", "ppl"))
    output = session.run.output
    found, others = checkpoint.evaluated(output, session.metric, greater_is_better=greater)
    if names := [folder.name for folder in others if folder.name not in session.told_apart]:
        session.told_apart |= {*names}
        log.warning(
            "%s evaluated on other records, or by other settings, than the newest checkpoint: not "
            "compared with it",
            f"{listed(names, 'and')} {'were' if len(names) > 1 else 'was'}",
        )
    return found
