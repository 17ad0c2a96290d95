"""A run while it goes on: its parts, what happens after each step, and what it leaves behind.

Built once by a recipe. Resuming is part of building: weights, optimizer state, place in the data
and random state come from the checkpoint, and records of steps after it are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import ernie
from ernie.chat import write_lock
from ernie.kernels import report
from ernie.model import KEPT_FLOAT32
from ernie.settings import ConfigError
from erniekit import checkpoint, lora, losses, metrics
from erniekit.build import build_model, lora_of, trained_parameters
from erniekit.config import Run
from erniekit.data.loader import Batch, Stream, prefetched
from erniekit.gradients import Gradients, SummedEmbedding
from erniekit.loop import Parts, Progress, train
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.plan_report import record_error
from erniekit.report.reporter import Reporter

log = logging.getLogger("erniekit")

# Exit codes of `erniekit train` when it is asked to stop; it finishes the step and saves first.
STOPPED = {signal.SIGTERM: 0, signal.SIGINT: 130}


@dataclass(frozen=True)
class Method:
    """What one kind of training has of its own; `prepare` gets every batch that will be used, to be
    looked at before the model is built.

    `loss(model, batch, scale=, share=, gradients=)`; `evaluate(model, batches)` gives numbers for
    `metrics.eval_line`.
    """

    loss: Callable[..., losses.Loss]
    evaluate: Callable[[ernie.ErnieModel, Iterable[Batch]], dict[str, float]]
    prepare: Callable[[Iterable[Batch]], None] = lambda batches: None


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
    stopped_by_signal: int = 0

    def __post_init__(self) -> None:
        run = self.run
        weights = None if run.is_lora else self.resumed
        self.model = build_model(run, self.device, weights)
        if run.is_lora and (adapter := self.resumed or run.model.lora_path):
            load_adapter(self.model, run, Path(adapter))
        self.trained = trained_parameters(self.model)
        self.gradients = _gradients(self.model, run, self.trained)
        self.optimizer = OPTIMIZERS[run.optimisation.optim](
            self.trained,
            treatments(
                self.trained,
                run.optimisation,
                num_layers=self.model.config.num_hidden_layers,
                lora_plus_scale=run.model.lora_plus_scale,
            ),
            run.optimisation,
            seed=run.training.seed,
        )
        self.progress = Progress()
        if self.resumed:
            tensors = load_file(self.resumed / checkpoint.OPTIMIZER_FILE)
            self.optimizer.load(tensors, self.state["num_updates"])
            self.progress = Progress.from_dict(self.state["progress"])
            _compare_settings(self.state["settings"], run)
            torch.set_rng_state(torch.tensor(self.state["rng"], dtype=torch.uint8))
        self.reporter = Reporter(
            run,
            self.model,
            self.train_stream,
            self.eval_stream,
            step=self.progress.step if self.resumed else -1,
            num_steps=self.num_steps,
        )
        self.signal: int | None = None
        t = run.training
        has_eval = self.eval_stream is not None
        self.eval_every = self._every(t.evaluation_strategy, t.eval_steps or 500) * has_eval
        self.save_every = self._every(t.save_strategy, t.save_steps)
        self._tell()

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
        if names := self.run.without_effect:
            log.info("settings of ERNIEKit without effect here: %s", ", ".join(names))

    def train(self) -> bool:
        """Run the loop; True when it came to its end, False when a signal stopped it."""
        if not self.progress.step:
            if self.eval_every:
                self.reporter.write({"step": 0, **self._evaluated(0)})
            self.reporter.answer(0)
        data, training = self.run.data, self.run.training
        batches = prefetched(
            self.train_stream.batches(training.batch_size, self.progress.cursor),
            data.prefetch_factor * training.gradient_accumulation_steps
            if data.dataloader_num_workers
            else 0,
        )
        with _caught_signals(self), contextlib.closing(self.reporter):
            train(self._parts(), batches, self.progress, self._after_step)
        batches.close()
        return self.signal is None or self.progress.step == self.num_steps

    def _parts(self) -> Parts:
        run, model = self.run, self.run.model
        full = not run.is_lora
        loss = partial(self.method.loss, gradients=self.gradients)
        return Parts(
            self.model,
            loss,
            self.optimizer,
            self.gradients,
            run.optimisation,
            self.num_steps,
            run.training.gradient_accumulation_steps,
            self.train_stream.epoch_size,
            run.training.max_skipped_steps,
            model.moe_use_aux_free_update_coef if full else 0.0,
        )

    def _after_step(self, record: dict[str, Any]) -> bool:
        step = record["step"]
        is_last = step == self.num_steps
        self.reporter.tell(record)
        if self.eval_every and (step % self.eval_every == 0 or is_last):
            record = record | self._evaluated(step)
        self.reporter.write(record)
        is_due = bool(self.save_every) and (is_last or step % self.save_every == 0)
        if is_due or self.signal is not None:
            self.save()
        return self.signal is not None

    def _evaluated(self, step: int) -> dict[str, float]:
        assert self.eval_stream is not None
        training, limit = self.run.training, self.run.training.max_evaluate_steps
        batches = self.eval_stream.batches(training.batch_size, end=self.eval_stream.epoch_size)
        values = self.method.evaluate(self.model, islice(batches, limit if limit > 0 else None))
        log.info("%s", metrics.eval_line(values, step))
        return values

    # --- saving ---

    def save(self) -> None:
        """Write a checkpoint of this moment, then drop the oldest ones."""
        state = {
            "num_steps": self.num_steps,
            "num_updates": self.optimizer.num_updates,
            "progress": self.progress.to_dict(),
            "rng": torch.get_rng_state().tolist(),
            "settings": self.run.flat(),
        }
        tensors = self.optimizer.tensors()
        kept = self.trained if self.run.is_lora else dict(self.model.named_parameters())
        num_bytes = sum(t.numel() * t.element_size() for t in (*tensors.values(), *kept.values()))

        def write(folder: Path) -> None:
            self._write_weights(folder)
            (folder / checkpoint.OPTIMIZER_FILE).parent.mkdir()
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                folder / checkpoint.OPTIMIZER_FILE,
            )

        folder = checkpoint.save(self.run.output, self.progress.step, write, state, num_bytes)
        checkpoint.prune(self.run.output, self.run.training.save_total_limit)
        self.reporter.write_page()
        log.info("saved %s", folder)

    def _write_weights(self, folder: Path) -> None:
        self._write_model(folder)
        encoder = self.train_stream.encoder
        write_lock(folder, encoder.template, encoder.tokenizer)

    def _write_model(self, folder: Path) -> None:
        if not self.run.is_lora:
            ernie.save(self.model, folder, layout=self.model.layout)
            return
        tensors = {k: t.cpu().contiguous() for k, t in lora.adapter_tensors(self.model).items()}
        save_file(tensors, folder / lora.ADAPTER_FILE, metadata={"format": "pt"})
        config = lora.adapter_config(
            self.model, lora_of(self.run), self.run.model.model_name_or_path
        )
        checkpoint.replace_text(folder / lora.ADAPTER_CONFIG, config)
        if self.model.tokenizer is not None:
            self.model.tokenizer.save(folder)

    def finish(self) -> int:
        """Write the final model into the output folder itself: adapter, or bfloat16 weights."""
        output = self.run.output
        record_error(self.run, self.device)
        self.gradients.release()
        if not self.run.is_lora:
            self.optimizer.state.clear()
            _to_bfloat16(self.model)
        self._write_weights(output)
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
_HARMLESS = {"output_dir", "resume_from_checkpoint", "max_steps", "logging_steps", "save_steps"}


def _compare_settings(before: dict[str, Any], run: Run) -> None:
    """Warn that a resumed run is not what the unbroken one would have been."""
    now = run.flat()
    changed = [k for k in now if k not in _HARMLESS and now[k] != before.get(k, now[k])]
    if changed:
        told = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
        log.warning("settings differ from those of the checkpoint: %s", told)


def load_adapter(model: ernie.ErnieModel, run: Run, folder: Path) -> None:
    saved, wanted = lora.read_adapter_config(folder), lora_of(run)
    if saved != wanted:
        raise ConfigError(
            f"the adapter in {folder} has rank {saved.rank}, alpha {saved.alpha:g} and rslora "
            f"{saved.is_rank_stabilised}; this run says {wanted.rank}, {wanted.alpha:g} and "
            f"{wanted.is_rank_stabilised}: give the same, or another output_dir"
        )
    path = folder / lora.ADAPTER_FILE
    lora.load_adapter(model, load_file(path), str(path))


def _gradients(model: ernie.ErnieModel, run: Run, trained: dict[str, Any]) -> Gradients:
    dtype = torch.float32 if run.optimisation.amp_master_grad else torch.bfloat16
    head, embedding = model.head_weight, model.model.embed_tokens
    gradients = Gradients(trained, dtype, float32_for=(head, embedding.weight))
    if embedding.weight.requires_grad:
        model.model.embed_tokens = SummedEmbedding(embedding, gradients)
    return gradients


def _to_bfloat16(model: ernie.ErnieModel) -> None:
    """Round the weights to what is published and served; routers and their bias stay float32."""
    for name, parameter in model.named_parameters():
        if not name.endswith(KEPT_FLOAT32):
            parameter.data = parameter.data.to(torch.bfloat16)


class _caught_signals:
    """While active, the first SIGTERM or Ctrl-C asks the session to stop after the step; a second
    Ctrl-C stops at once.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self._note) for s in STOPPED}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.session.signal = number
        self.session.stopped_by_signal = STOPPED[signal.Signals(number)]
        log.warning("stopping after this step (%s)", signal.Signals(number).name)
        signal.signal(number, self.before[signal.Signals(number)])
