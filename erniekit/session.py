"""A run while it goes on: its parts, what happens after each step, and what it leaves behind.

Built once by a recipe. Resuming is part of building: weights, optimizer state, place in the data
and random state come from the checkpoint, and records of steps after it are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ernie.kernels import report
from ernie.moe.router import Router
from ernie.settings import ConfigError
from erniekit import checkpoint, debug, metrics, snapshot
from erniekit.average import Average
from erniekit.build import build_model, load_adapter, num_groups, trained_parameters
from erniekit.config import Parallel, Run, changed, effects
from erniekit.data.batch import Batch
from erniekit.data.prefetch import prefetched
from erniekit.data.stream import Stream
from erniekit.dropout import add_dropout
from erniekit.evaluate import eval_batches
from erniekit.loop import Orthogonal, Parts, Progress, TooManySkipped, TrainingError, train
from erniekit.method import Method
from erniekit.optim import AVERAGE, OPTIMIZERS, treatments
from erniekit.parallel.forms import form_of
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.plan_report import record_error
from erniekit.report.reporter import Reporter
from erniekit.saver import Saver
from erniekit.signals import CaughtSignals

log = logging.getLogger("erniekit")

# A file of this name in output_dir asks for a checkpoint after the step; it is then removed.
REQUEST_FILE = "SAVE"


@dataclass
class Session:
    """`train()` goes through the steps, `finish()` writes the final model.

    `resumed` is the checkpoint to go on from, `state` its trainer_state.json; None and {} at the
    start.
    """

    run: Run
    device: str
    num_steps: int
    resumed: Path | None
    state: dict[str, Any]
    train_stream: Stream
    eval_stream: Stream | None
    method: Method
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        run = self.run
        weights = None if run.is_lora else self.resumed
        self.form = form_of(run, self.ranks)
        self.model = build_model(
            run, self.device, weights, in_host_memory=not self.form.straight_into_sums
        )
        self.model.tokenizer = self.train_stream.encoder.tokenizer  # the same; one is enough
        if run.is_lora and (adapter := self.resumed or run.model.lora_path):
            load_adapter(self.model, run, Path(adapter))
        self.dropout = add_dropout(self.model, run)
        self.form.divide(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.trained = trained_parameters(self.model)
        dtype = torch.float32 if run.optimisation.amp_master_grad else torch.bfloat16
        self.gradients = self.form.gradients(self.model, self.trained, dtype)
        vision = self.model.config.vision_config
        self.optimizer = OPTIMIZERS[run.optimisation.optim](
            self.form.parts(self.trained),
            treatments(
                self.trained,
                run.optimisation,
                num_layers=self.model.config.num_hidden_layers,
                num_tower_blocks=vision.depth if vision else 0,
                lora_plus_scale=run.model.lora_plus_scale,
            ),
            run.optimisation,
            seed=run.training.seed,
            kept=self.form.kept(),
        )
        self.progress = Progress()
        if self.resumed:
            self._take_state(self.resumed)
        decay = run.optimisation.ema_decay
        self.average = Average(self.optimizer, decay) if decay else None
        if self.resumed and self.average is not None:
            self._take_average(self.resumed)
        encoder = self.train_stream.encoder
        self.saver = Saver(
            run.output,
            lambda folder, tensors: snapshot.write(run, self.model, encoder, tensors, folder),
            self._saved,
            is_async=run.training.use_async_save,
        )
        self.reporter = Reporter(
            run,
            self.model,
            self.train_stream,
            self.eval_stream,
            step=self.progress.step if self.resumed else -1,
            num_steps=self.num_steps,
            is_silent=not self.ranks.is_first,
        )
        self.signals = CaughtSignals()
        self.is_stopped = False  # by any rank
        t = run.training
        has_eval = self.eval_stream is not None
        self.eval_every = self._every(t.evaluation_strategy, t.eval_steps or 500) * has_eval
        self.save_every = self._every(t.save_strategy, t.save_steps)
        self._tell()

    def _take_state(self, folder: Path) -> None:
        """Optimizer, place in the data and random state of a checkpoint."""
        tensors = load_file(folder / checkpoint.OPTIMIZER_FILE)
        self.form.load_state(self.optimizer, tensors, self.state["num_updates"])
        self.progress = Progress.from_dict(self.state["progress"])
        ranks_before = self.state.get("ranks", 1)
        _compare_settings(self.state["settings"], self.run, ranks_before, self.ranks.size)
        torch.set_rng_state(torch.tensor(self.state["rng"], dtype=torch.uint8))
        if self.method.reference is not None:
            self.method.reference.load_state(self.state.get("reference", {}))
        path = folder / checkpoint.BATCHES_FILE
        if self.method.source is not None and path.is_file():
            self.method.source.load(load_file(path))

    def _take_average(self, folder: Path) -> None:
        assert self.average is not None
        source = folder / checkpoint.AVERAGE_FOLDER
        if source.is_dir():
            self.average.load(self._parts_of(source), str(source))
        else:
            log.warning("%s has no averaged weights: the average begins with its weights", folder)

    def _parts_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """What this rank has of the weights of a folder, by parameter."""
        for name, tensor in snapshot.read_weights(self.run, folder):
            yield name, self.form.part_of(self.parameters[name], tensor)

    def _every(self, strategy: str, steps: int) -> int:
        """Steps between two events of a strategy; 0 for never."""
        if strategy == "epoch":
            return max(round(self.num_steps / self.run.training.num_train_epochs), 1)
        return steps if strategy == "steps" else 0

    def _tell(self) -> None:
        num_all = sum(p.numel() for p in self.model.parameters())
        num_trained = sum(p.numel() for p in self.trained.values())
        o = self.run.optimisation
        first, last = self.progress.step + 1, self.num_steps
        log.info(
            "training %s of %s parameters (%s) on %s; gradients %s, moments %s; %s",
            f"{num_trained:,}",
            f"{num_all:,}",
            self.run.model.fine_tuning,
            self.model.device,
            "float32" if o.amp_master_grad else "bfloat16",
            "of 8 bits"
            if o.optim == "adamw_8bit"
            else "bfloat16"
            if o.use_lowprecision_moment
            else "float32",
            f"steps {first} to {last}" if first <= last else f"all {last} steps are done",
        )
        modules = sorted(set(report(self.device).values()))
        log.info("kernels: %s", ", ".join(modules))
        if self.device == "cpu":
            log.info("products: %s", self.run.model.cpu_products)
        names = list(self.run.without_effect)
        if not any(isinstance(module, Router) for module in self.model.modules()):
            idle = effects.of_experts(changed(self.run))
            names += [f"{key} (a dense model)" for key in idle if key not in names]
        if names:
            log.info("settings without effect here: %s", ", ".join(names))

    @property
    def stopped_by_signal(self) -> int:
        """Exit status of the process when the run was stopped before its end."""
        return self.signals.exit_status

    def train(self) -> bool:
        """Run the loop; True when it came to its end, False when it was stopped before."""
        if self._is_stopped:
            log.info("stopped after step %d, as stop_after_step says", self.progress.step)
            return False
        if not self.progress.step:
            if self.eval_every:
                self.reporter.write({"step": 0, **self._evaluated(0)})
            self.reporter.answer(0)
        run, data, training = self.run, self.run.data, self.run.training
        if self.method.source is not None:
            batches = self.method.source.batches(self.model, self.progress, self.num_steps)
        else:
            batches = prefetched(
                self.train_stream.batches(training.batch_size, self.progress.cursor),
                data.prefetch_factor * training.gradient_accumulation_steps * self.ranks.size
                if data.dataloader_num_workers
                else 0,
            )
        with CaughtSignals() as self.signals, contextlib.closing(self.reporter), self.saver:
            try:
                with contextlib.closing(batches):
                    train(self._parts(), batches, self.progress, self._after_step)
            except TooManySkipped as error:
                if not self.ranks.is_first:
                    raise
                folder = debug.write_bundle(run, self.train_stream, error.last)
                raise TrainingError(f"{error}; what led to it is in {folder}") from None
        return not self.is_stopped or self.progress.step == self.num_steps

    def _parts(self) -> Parts:
        run, model = self.run, self.run.model
        gradients = self.gradients if self.form.straight_into_sums else None
        loss = partial(self.method.loss, gradients=gradients)
        return Parts(
            model=self.model,
            loss=loss,
            optimizer=self.optimizer,
            gradients=self.gradients,
            optimisation=run.optimisation,
            num_steps=self.num_steps,
            batches_per_step=run.training.gradient_accumulation_steps,
            epoch_size=self.train_stream.epoch_size,
            training=run.training,
            bias_step=0.0 if run.is_lora else model.moe_use_aux_free_update_coef,
            orthogonal=self._orthogonal(),
            ranks=self.ranks,
            after_update=partial(self.form.after_update, self.trained),
            average=self.average,
            measure=self._measured,
            dropout=self.dropout,
        )

    def _measured(self, window: list[Batch]) -> dict[str, Any]:
        """What the loss must know of a step; before it, the reference moves where it is due."""
        step, reference = self.progress.step, self.method.reference
        if reference is not None and step and reference.every and step % reference.every == 0:
            reference.move(self.model, self._batches_ahead(reference.every))
        return self.method.measure(self.model, window, self.ranks)

    def _batches_ahead(self, num_steps: int) -> Iterator[Batch]:
        """Those of the next steps, and those of an evaluation."""
        training = self.run.training
        num_steps = min(num_steps, self.num_steps - self.progress.step)
        count = num_steps * training.gradient_accumulation_steps * self.ranks.size
        again = self.train_stream.again()
        yield from islice(again.batches(training.batch_size, self.progress.cursor), count)
        if self.eval_every:
            assert self.eval_stream is not None
            yield from eval_batches(self.run, self.eval_stream)

    def _orthogonal(self) -> Orthogonal | None:
        """The decoupled update of routers, where it is wanted."""
        model = self.run.model
        weight = model.moe_orthogonal_loss_lambda
        if self.run.is_lora or not weight or model.moe_orthogonal_update == "loss":
            return None
        by_learning_rate = model.moe_orthogonal_update == "decoupled_lr"
        return Orthogonal(weight, by_learning_rate, num_groups(self.run))

    @property
    def _is_stopped(self) -> bool:
        """Whether a signal or stop_after_step ends the run before its last step."""
        last = self.run.training.stop_after_step
        return self.signals.caught or (last is not None and self.progress.step >= last)

    def _after_step(self, record: dict[str, Any]) -> bool:
        step = record["step"]
        is_last = step == self.num_steps
        self.saver.settle()
        self.reporter.tell(record)
        if self.eval_every and (step % self.eval_every == 0 or is_last):
            record = record | self._evaluated(step)
        self.reporter.write(record)
        request = self.run.output / REQUEST_FILE
        # Rank 0 sees the request, and a signal comes to each in its own time: all do the same.
        is_asked = bool(self.ranks.largest(self.ranks.is_first and request.exists()))
        is_due = bool(self.save_every) and (is_last or step % self.save_every == 0)
        # Asked once: a signal may come at any moment.
        self.is_stopped = bool(self.ranks.largest(self._is_stopped))
        if is_due or is_asked or self.is_stopped:
            self.save(record)
        if is_asked and self.ranks.is_first:
            self.saver.settle(wait=True)
            request.unlink(missing_ok=True)
        return self.is_stopped

    def _evaluated(self, step: int) -> dict[str, float]:
        assert self.eval_stream is not None
        batches = eval_batches(self.run, self.eval_stream)
        values = self.method.evaluate(self.model, batches, ranks=self.ranks)
        log.info("%s", metrics.eval_line(values, step))
        if self.metric not in values:
            raise ConfigError(
                f"metric_for_best_model={self.metric} is no number of an evaluation; use one of "
                f"{', '.join(values)}"
            )
        return values

    # --- saving ---

    def save(self, record: dict[str, Any]) -> None:
        """Write a checkpoint of this moment, after a step with this record."""
        state = {
            "num_steps": self.num_steps,
            "num_updates": self.optimizer.num_updates,
            "progress": self.progress.to_dict(),
            "rng": torch.get_rng_state().tolist(),
            "evaluation": {k: v for k, v in record.items() if k.startswith("eval_")},
            "settings": self.run.flat(),
            "ranks": self.ranks.size,
        }
        if self.method.reference is not None:
            state["reference"] = self.method.reference.state()
        tensors = self.tensors()
        if self.ranks.is_first:
            self.saver.save(self.progress.step, tensors, state)
        self.ranks.wait()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds besides its state, whole, on rank 0; see `snapshot`.
        All ranks must call it.

        These may be the tensors themselves, which the next step changes.
        """
        kept = self.trained if self.run.is_lora else self.parameters
        weights, state = self.form.whole(kept), self.form.whole_state(self.optimizer)
        mark = f".{AVERAGE}"
        averages = {k.removesuffix(mark): state.pop(k) for k in list(state) if k.endswith(mark)}
        parts = (
            (snapshot.WEIGHTS, weights),
            (snapshot.OPTIMIZER, state),
            (snapshot.AVERAGE, averages),
            (snapshot.BATCHES, self.method.source.tensors() if self.method.source else {}),
        )
        return {prefix + name: t.detach() for prefix, part in parts for name, t in part.items()}

    def _saved(self, folder: Path) -> None:
        """A checkpoint is whole: see which is the best now, and drop the oldest ones."""
        output, best = self.run.output, self._best()
        if best is not None:
            pointer = {"checkpoint": best[1].name, self.metric: best[0]}
            checkpoint.replace_text(output / checkpoint.BEST_FILE, json.dumps(pointer) + "\n")
        limit = self.run.training.save_total_limit
        checkpoint.prune(output, limit, best[1] if best is not None else None)
        self.reporter.write_page()
        log.info("saved %s", folder)

    @property
    def metric(self) -> str:
        """The number that says which checkpoint is best."""
        name = self.run.training.metric_for_best_model or self.method.metric
        return name if name.startswith("eval_") else f"eval_{name}"

    def _best(self) -> tuple[float, Path] | None:
        greater = self.run.training.greater_is_better
        if greater is None:
            greater = not self.metric.endswith(("loss", "ppl"))
        return checkpoint.best(self.run.output, self.metric, greater_is_better=greater)

    @torch.no_grad()
    def _take_weights(self, folder: Path) -> None:
        """The weights of a checkpoint, and its averages, in place of those of the last step."""
        for name, part in self._parts_of(folder):
            self.form.held(self.parameters[name]).copy_(part)
        if self.average is not None:
            self._take_average(folder)

    def finish(self) -> int:
        """Write the final model into the output folder itself: adapter, or bfloat16 weights."""
        run, output, encoder = self.run, self.run.output, self.train_stream.encoder
        if self.ranks.is_first:
            record_error(run, self.device, self.ranks)
        self.gradients.release()
        best = self._best() if run.training.load_best_model_at_end and self.ranks.is_first else None
        # Rank 0 has seen its checkpoints become whole.
        value, name = self.ranks.told([best[0], best[1].name] if best is not None else [0.0, ""])
        if name not in ("", f"checkpoint-{self.progress.step}"):
            log.info("the final model is that of %s, %s %.4f", output / name, self.metric, value)
            self._take_weights(output / name)
        tensors = self.tensors()
        weights = snapshot.part(tensors, snapshot.WEIGHTS)
        if not self.ranks.is_first:
            return 0
        snapshot.write_model(run, self.model, encoder, weights, output, rounded=True)
        if self.average is not None:
            weights |= snapshot.part(tensors, snapshot.AVERAGE)
            folder = output / checkpoint.AVERAGE_FOLDER
            snapshot.write_model(run, self.model, encoder, weights, folder, rounded=True)
        faults = self.train_stream.faults
        if faults.total:
            log.warning(
                "%d records were left out while training: %s",
                faults.total,
                ", ".join(f"{reason} ({n})" for reason, n in faults.by_reason.most_common()),
            )
        log.info("finished: the %s is in %s", "adapter" if self.run.is_lora else "model", output)
        if self.run.is_lora:
            log.info("merge it into the base model with: erniekit export %s/run.yaml", output)
        return 0


# Changing these between two starts changes nothing that has been computed.
_HARMLESS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_steps", "stop_after_step",
    "logging_steps", "save_steps", "save_strategy", "save_total_limit", "use_async_save",
    "load_best_model_at_end", "use_checkpoint", "report_to", "logging_dir", "disable_tqdm",
    "evaluation_strategy", "eval_steps", "max_evaluate_steps", "answer_steps", "num_answers",
}  # fmt: skip


_HARMLESS |= {field.name for field in dataclasses.fields(Parallel)}


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
    changed = [k for k in now if k not in _HARMLESS and now[k] != before.get(k, now[k])]
    if changed:
        told = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
        log.warning("settings differ from those of the checkpoint: %s", told)
