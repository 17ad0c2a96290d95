"""The start of a run: from its settings and streams to a `Session`, at step 0 or where it was left.

Resuming is part of it: weights, optimizer state, place in the data and random state come from the
checkpoint; later checkpoints are set aside, and records of later steps are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from ernie.kernels import report
from ernie.model import ErnieModel
from ernie.moe.router import Router
from erniekit import checkpoint, snapshot
from erniekit.average import Average
from erniekit.build import build_model, load_adapter, trained_parameters
from erniekit.config import Run, changed, effects, to_yaml
from erniekit.data.stream import Stream
from erniekit.data.unread import of_first_records
from erniekit.dropout import Dropout, add_dropout
from erniekit.loop import Progress
from erniekit.method import Method
from erniekit.optim import OPTIMIZERS, AdamW, treatments, warmup_steps
from erniekit.parallel.forms import form_of
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.report.reporter import Reporter
from erniekit.session import Session

if TYPE_CHECKING:
    from erniekit.parallel.forms import Form

log = logging.getLogger("erniekit")


def started(
    run: Run,
    device: str,
    *,
    num_steps: int,
    resumed: Path | None,
    state: dict[str, Any],
    train_stream: Stream,
    eval_stream: Stream | None,
    method: Method,
    inputs: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Session:
    """Everything that the steps of a run need. `resumed` is the checkpoint to go on from, `state`
    its trainer_state.json; None and {} at the start. `inputs` as in `inputs_of`, on rank 0.
    """
    form = form_of(run, ranks)
    model, dropout = _model(run, device, resumed, train_stream, form)
    parameters, trained = dict(model.named_parameters()), trained_parameters(model)
    dtype = torch.float32 if run.optimisation.amp_master_grad else torch.bfloat16
    gradients = form.gradients(model, trained, dtype)
    optimizer = _optimizer(run, model, trained, form)
    if resumed:
        _load_state(resumed, state, optimizer, form)
        _compare_settings(state["settings"], run, state.get("ranks", 1), ranks.size)
        _take_rest(resumed, state, method)
    progress = Progress.from_dict(state["progress"]) if resumed else Progress()
    decay = run.optimisation.ema_decay
    average = Average(optimizer, decay) if decay else None
    if resumed and average is not None:
        snapshot.fill_average(average, run, form, parameters, resumed)
    if ranks.is_first:
        _take_over(run, resumed, progress.step, num_steps)
    reporter = Reporter(
        run,
        model,
        train_stream,
        eval_stream,
        step=progress.step if resumed else -1,
        num_steps=num_steps,
        is_silent=not ranks.is_first,
    )
    if ranks.is_first:  # after about.json, by which the folder is known as that of a run
        checkpoint.replace_text(run.output / "run.yaml", to_yaml(run))
    session = Session(
        run=run,
        device=device,
        num_steps=num_steps,
        train_stream=train_stream,
        eval_stream=eval_stream,
        method=method,
        inputs=inputs,
        ranks=ranks,
        form=form,
        model=model,
        dropout=dropout,
        parameters=parameters,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        progress=progress,
        reporter=reporter,
        first_step=progress.step + 1,
    )
    _tell(session)
    return session


def _take_over(run: Run, resumed: Path | None, step: int, num_steps: int) -> None:
    """Make the output folder that of this start, now that everything it needs is built: what other
    starts have made of later steps goes out of its way.
    """
    if run.training.overwrite_output_dir:
        checkpoint.remove_all(run.output)
    is_here = resumed is not None and resumed.resolve().parent == run.output.resolve()
    checkpoint.set_aside(run.output, step if is_here else 0)
    if step < min(num_steps, run.training.stop_after_step or num_steps):
        checkpoint.remove_results(run.output)


def _model(
    run: Run, device: str, resumed: Path | None, train_stream: Stream, form: Form
) -> tuple[ErnieModel, Dropout]:
    """The model with the weights of the start, divided over the ranks, and its dropout."""
    weights = None if run.is_lora else resumed
    model = build_model(run, device, weights, in_host_memory=not form.straight_into_sums)
    model.tokenizer = train_stream.encoder.tokenizer  # the same; one is enough
    if run.is_lora and (adapter := resumed or run.model.lora_path):
        load_adapter(model, run, Path(adapter))
    dropout = add_dropout(model, run)
    form.divide(model)
    return model, dropout


def _optimizer(
    run: Run, model: ErnieModel, trained: Mapping[str, nn.Parameter], form: Form
) -> AdamW:
    """The optimizer of this rank's parts, with its state of the start."""
    vision = model.config.vision_config
    return OPTIMIZERS[run.optimisation.optim](
        form.parts(trained),
        treatments(
            trained,
            run.optimisation,
            num_layers=model.config.num_hidden_layers,
            num_tower_blocks=vision.depth if vision else 0,
            lora_plus_scale=run.model.lora_plus_scale,
        ),
        run.optimisation,
        seed=run.training.seed,
        kept=form.kept(),
    )


def _load_state(folder: Path, state: dict[str, Any], optimizer: AdamW, form: Form) -> None:
    """The optimizer's state of a checkpoint."""
    tensors = load_file(folder / checkpoint.OPTIMIZER_FILE)
    form.load_state(optimizer, tensors, state["num_updates"])


def _take_rest(folder: Path, state: dict[str, Any], method: Method) -> None:
    """Random state, and batches that are left, of a checkpoint."""
    torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))
    path = folder / checkpoint.BATCHES_FILE
    if method.source is not None and path.is_file():
        method.source.load(load_file(path), state)


def _done(step: int, num_steps: int) -> str:
    if step > num_steps:
        return f"{step} steps are done, of {num_steps}"
    return f"all {step} steps are done"


def _tell(session: Session) -> None:
    num_all = sum(p.numel() for p in session.model.parameters())
    num_trained = sum(p.numel() for p in session.trained.values())
    o = session.run.optimisation
    first, last = session.progress.step + 1, session.num_steps
    log.info(
        "training %s of %s parameters (%s) on %s; gradients %s, moments %s; %s",
        f"{num_trained:,}",
        f"{num_all:,}",
        session.run.model.fine_tuning,
        session.model.device,
        "float32" if o.amp_master_grad else "bfloat16",
        "of 8 bits"
        if o.optim == "adamw_8bit"
        else "bfloat16"
        if o.use_lowprecision_moment
        else "float32",
        f"steps {first} to {last}" if first <= last else _done(session.progress.step, last),
    )
    modules = sorted(set(report(session.device).values()))
    log.info("kernels: %s", ", ".join(modules))
    if session.device == "cpu":
        log.info("products: %s", session.run.model.cpu_products)
    if session.eval_stream is not None and not session.eval_every:
        log.info("no evaluation while training (evaluation_strategy: no)")
    if (warmup := warmup_steps(last, o)) >= last and o.lr_scheduler_type != "constant":
        log.warning(
            "the warm-up of %d steps does not end within the %d of the run: learning_rate %g is "
            "never reached", warmup, last, o.learning_rate,
        )  # fmt: skip
    names = [effects.told(session.run, key) for key in session.run.without_effect]
    if not any(isinstance(module, Router) for module in session.model.modules()):
        idle = effects.of_experts(changed(session.run))
        names += [f"{key} (a dense model)" for key in idle if key not in names]
    if session.ranks.size == 1:
        names += [f"{key} (one process)" for key in effects.of_ranks(changed(session.run))]
    if o.offload_optim and session.device == "cpu":
        names.append("offload_optim (the optimizer's state is in the host's memory anyway)")
    elif o.offload_optim:
        away = [t for t in session.optimizer.tensors().values() if not t.is_cuda]
        num = sum(t.numel() * t.element_size() for t in away) / 2**30
        log.info("the optimizer's state, %.2f GiB a rank, lies in the host's memory", num)
    if names:
        log.info("settings without effect here: %s", ", ".join(names))
    if not session.run.stage.has_rollouts:  # rewards may read any key
        streams = filter(None, (session.train_stream, session.eval_stream))
        if unread := [key for stream in streams for key in of_first_records(stream)]:
            log.warning("keys of records that are not read: %s", ", ".join(unread))


def _compare_settings(
    before: dict[str, Any], run: Run, ranks_before: int = 1, ranks_now: int = 1
) -> None:
    """Warn that a resumed run is not what the unbroken one would have been.

    On another number of ranks it is, within rounding, if a step has as many rows as before.
    """
    now = run.flat()
    if ranks_before != ranks_now:
        steps = "gradient_accumulation_steps"
        rows_before, rows_now = before[steps] * ranks_before, now[steps] * ranks_now
        if rows_before == rows_now:
            before = before | {steps: now[steps]}
        else:
            log.warning(
                "the checkpoint is of %d ranks with %s=%d, this run has %d with %d: a step has %g "
                "times as many rows", ranks_before, steps, before[steps], ranks_now, now[steps],
                rows_now / rows_before,
            )  # fmt: skip
    changed = [k for k in now if k not in effects.HARMLESS and now[k] != before.get(k, now[k])]
    if changed:
        told = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
        log.warning("settings differ from those of the checkpoint: %s", told)
