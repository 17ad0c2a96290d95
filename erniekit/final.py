"""The end of a run: the model that it leaves in the output folder."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import torch

from erniekit import checkpoint, snapshot
from erniekit.plan_report import record_error
from erniekit.session import Session, evaluated, tell_nothing_trained, tensors_of

log = logging.getLogger("erniekit")


def finish(session: Session) -> int:
    """Write the final model into the output folder itself: adapter, or bfloat16 weights. Returns
    the exit code of the process.
    """
    run, output, encoder = session.run, session.run.output, session.train_stream.encoder
    session.gradients.release()
    _choose_weights(session)
    tensors = tensors_of(session)
    weights = snapshot.part(tensors, snapshot.WEIGHTS)
    if not session.ranks.is_first:
        return 0
    checkpoint.remove_model(output)  # a model and an adapter would lie beside each other
    snapshot.write_model(run, session.model, encoder, weights, output, rounded=True)
    if session.average is not None:
        weights |= snapshot.part(tensors, snapshot.AVERAGE)
        folder = output / checkpoint.AVERAGE_FOLDER
        snapshot.write_model(run, session.model, encoder, weights, folder, rounded=True)
    record_error(run, session.device, session.first_step, session.ranks)
    if not checkpoint.is_passing(output):
        _tell(session)
    return 0


def _choose_weights(session: Session) -> None:
    """Those of the best checkpoint where the run wants them, else those of the last step."""
    is_wanted, output = session.run.training.load_best_model_at_end, session.run.output
    value, name = session.ranks.broadcast(
        _best_whole(session) if is_wanted and session.ranks.is_first else [0.0, ""]
    )
    if name:
        log.info("the final model is that of %s, %s %.4f", output / name, session.metric, value)
        _take_weights(session, output / name)


def _best_whole(session: Session) -> list[Any]:
    """Value and name of the best checkpoint that is whole; damaged ones are told. 0 and the empty
    string where that is the last step, whose weights are at hand, or where there is none.
    """
    for value, folder in evaluated(session):
        if folder.name == f"checkpoint-{session.progress.step}":
            return [0.0, ""]
        damage = checkpoint.what_is_wrong(folder)
        if not damage:
            return [value, folder.name]
        log.warning(
            "SKIPPED the damaged checkpoint %s, %s %.4f, for the next best one: %s",
            folder, session.metric, value, damage,
        )  # fmt: skip
    log.warning("no evaluated checkpoint is whole: the final model is that of the last step")
    return [0.0, ""]


@torch.no_grad()
def _take_weights(session: Session, folder: Path) -> None:
    """The weights of a checkpoint, and its averages, in place of those of the last step."""
    run, form, parameters = session.run, session.form, session.parameters
    for name, part in snapshot.parts_of(run, form, parameters, folder):
        form.held(parameters[name]).copy_(part)
    if session.average is not None:
        snapshot.fill_average(session.average, run, form, parameters, folder)


def _tell(session: Session) -> None:
    faults, output = session.train_stream.faults, session.run.output
    is_lora = session.run.is_lora
    if faults.total:
        log.warning(
            "%d records were left out while training: %s",
            faults.total,
            ", ".join(f"{reason} ({n})" for reason, n in faults.by_reason.most_common()),
        )
    log.info("finished: the %s is in %s", "adapter" if is_lora else "model", output)
    if is_lora:
        settings = shlex.quote(f"{output}/run.yaml")
        log.info("merge it into the base model with: erniekit export %s", settings)
    if session.first_step > session.num_steps:
        tell_nothing_trained(session, f"a run of {session.num_steps}")
