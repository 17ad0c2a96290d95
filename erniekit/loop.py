"""The training loop: one function for every recipe. The method is the loss that is passed in.

    window of batches -> loss and backward for each -> norm, clip, update -> record

Losses are sums over tokens times one over the number of trained tokens of the *whole* window (over
pairs and their number, where those are compared), so a step means the same however it is cut into
batches. A step whose loss or gradient is not finite, or whose gradient is far longer than lately,
changes nothing but counters.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ernie.model import ErnieModel
from ernie.moe import balance
from ernie.moe.layer import MoE
from ernie.moe.router import Router
from erniekit import memory, routing
from erniekit.average import Average
from erniekit.config import Optimisation, Training
from erniekit.data.batch import Batch
from erniekit.data.pack import Cursor
from erniekit.device_batch import to_device
from erniekit.dropout import Dropout
from erniekit.gradients import Gradients, length, squares_of
from erniekit.losses import Loss, routers_of
from erniekit.optim import AdamW, clip_scale, learning_rate_at
from erniekit.parallel.deal import dealt
from erniekit.parallel.ranks import ALONE, Ranks

log = logging.getLogger("erniekit")

_FEWEST_NORMS = 10  # before a median says what is usual


class TrainingError(ValueError):
    """Training cannot go on, and the user can do something about it."""


@dataclass
class SkippedStep:
    """A step that was not taken, with what it takes to find out why."""

    step: int
    reason: str
    start: Cursor  # place in the data before it
    window: list[Batch]
    norm_by_parameter: dict[str, float]


class TooManySkipped(TrainingError):
    """`last` is the step that was one too many."""

    def __init__(self, message: str, last: SkippedStep) -> None:
        super().__init__(message)
        self.last = last


@dataclass
class Progress:
    """What changes as training goes on, besides weights and optimizer; stored in checkpoints."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    total_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # up to and with the last step
    norms: list[float] = field(default_factory=list)  # of recent steps, where spikes are looked for
    idle: list[list[int]] = field(default_factory=list)  # steps since an expert's last token

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def last_taken(self) -> int:
        """The last step that was not skipped."""
        return self.step - self.skipped_in_a_row

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        return cls(**{**values, "cursor": Cursor(*values["cursor"])})


@dataclass(frozen=True)
class Orthogonal:
    """The router's orthogonality loss as an update of its own (`balance.update_orthogonal`)."""

    weight: float
    by_learning_rate: bool
    num_groups: int = 1


@dataclass
class Parts:
    """What a loop drives. `loss(model, batch, scale=, share=, **measured)` is the training method,
    where `measure(window)` gives what it must know of the whole step first.

    `batches_per_step` counts the passes of one rank; `after_update()` follows every update.
    """

    model: ErnieModel
    loss: Callable[..., Loss]
    optimizer: AdamW
    gradients: Gradients
    optimisation: Optimisation
    num_steps: int
    batches_per_step: int
    epoch_size: int
    training: Training
    bias_step: float = 0.0  # of the routing bias, per optimizer step
    orthogonal: Orthogonal | None = None
    ranks: Ranks = ALONE
    after_update: Callable[[], None] = lambda: None
    average: Average | None = None
    measure: Callable[[list[Batch]], dict[str, Any]] = lambda window: {}
    dropout: Dropout = field(default_factory=Dropout)


def train(
    parts: Parts,
    batches: Iterator[Batch],
    progress: Progress,
    after_step: Callable[[dict[str, Any]], bool],
) -> None:
    """Steps until `num_steps`, or until `after_step(record)` answers that it is enough.

    `progress` is moved along. All ranks are given the same batches, and each trains on its share.
    Raises TooManySkipped.
    """
    while progress.step < parts.num_steps:
        start = time.monotonic()
        parts.ranks.report_step(progress.step + 1)
        window = list(islice(batches, parts.batches_per_step * parts.ranks.size))
        assert window, "the stream of training batches has no end"
        record, skipped = _step(parts, window, progress)
        record["seconds"] = time.monotonic() - start
        record["tokens_per_second"] = record["num_tokens"] / record["seconds"]
        if skipped and progress.skipped_steps > parts.training.max_skipped_steps:
            after_step(record)
            raise TooManySkipped(
                f"skipped steps: {progress.skipped_steps}, the last step {progress.step}, because "
                f"{skipped.reason}; lower learning_rate, check the data, or raise "
                "max_skipped_steps",
                skipped,
            )
        if after_step(record):
            return


def _step(
    parts: Parts, window: list[Batch], progress: Progress
) -> tuple[dict[str, Any], SkippedStep | None]:
    learning_rate = learning_rate_at(progress.step, parts.num_steps, parts.optimisation)
    squares: dict[str, Tensor] = {}
    if parts.optimisation.optimizer_in_backward:
        tally, squares = _backward_and_update(parts, window, progress.step, learning_rate)
    else:
        scale = 1 / sum(batch.weight for batch in window)
        tally = _backward(parts, window, progress.step, scale)
        tally.sums["grad_norm"] = parts.gradients.norm()
    numbers = _on_host(tally.sums)
    reason = _why_skip(numbers["loss"], numbers["grad_norm"], parts.training, progress)
    skipped = None
    if not reason:
        _update(parts, tally.loads, learning_rate, numbers["grad_norm"])
    else:
        squares = squares or parts.gradients.squares()
        norms = {name: float(square.sqrt()) for name, square in squares.items()}
        skipped = SkippedStep(progress.step + 1, reason, progress.cursor, window, norms)
    parts.gradients.release()

    progress.step += 1
    progress.cursor = window[-1].cursor
    progress.total_tokens += sum(batch.num_tokens for batch in window)
    progress.skipped_steps += bool(reason)
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if reason else 0
    numbers["learning_rate"] = learning_rate
    return _record(parts, window, progress, tally, numbers, reason), skipped


def _record(
    parts: Parts,
    window: list[Batch],
    progress: Progress,
    tally: Tally,
    numbers: Mapping[str, float],
    reason: str,
) -> dict[str, Any]:
    """What is told of a step that is done; `reason` says why it was skipped, if it was."""
    first = ("loss", "learning_rate", "grad_norm")
    num_judged = sum(len(batch.keys) for batch in window)
    return {
        "step": progress.step,
        **{name: numbers[name] for name in first},
        "num_tokens": sum(batch.num_tokens for batch in window),
        "num_trained_tokens": sum(batch.num_trained for batch in window),
        **({f"num_{window[0].unit}": num_judged} if num_judged else {}),
        "total_tokens": progress.total_tokens,
        "epoch": round(progress.cursor.num_records / parts.epoch_size, 4),
        "peak_memory_gib": memory.peak_gib(parts.model.device),
        **{name: number for name, number in numbers.items() if name not in first},
        **routing.figures(
            tally.loads,
            tally.entropies,
            progress.idle,
            parts.model.config.moe_k or 1,
            num_banks=len(parts.model.config.experts_per_bank),
            with_loads=routing.tells_loads(progress.step, parts.num_steps),
        ),
        **({"skipped": True, "skipped_because": reason} if reason else {}),
    }


def _update(parts: Parts, loads: list[Tensor], learning_rate: float, norm: float) -> None:
    """Move the weights, the routing bias and the average."""
    if not parts.optimisation.optimizer_in_backward:
        scale = clip_scale(norm, parts.optimisation.max_grad_norm)
        parts.optimizer.step(parts.gradients.present(), learning_rate, scale)
        parts.after_update()
    if (o := parts.orthogonal) is not None:
        step_size = o.weight * (learning_rate if o.by_learning_rate else 1.0)
        for router in trained_routers(parts.model):
            balance.update_orthogonal(router.weight, step_size, o.num_groups)
    if parts.bias_step:
        _balance(parts.model, loads, parts.bias_step)
    if parts.average is not None:
        parts.average.update()


def _why_skip(loss: float, norm: float, training: Training, progress: Progress) -> str:
    """Why a step must not be taken, or the empty string. Notes its norm where spikes are skipped.

    A spike counts in the median too: one changes it little, and what lasts becomes usual.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "its loss or gradient is not finite"
    if not training.max_grad_spike:
        return ""
    reason, window = "", training.grad_spike_window
    if len(progress.norms) >= min(_FEWEST_NORMS, window):
        usual = median(progress.norms)
        if norm > training.max_grad_spike * usual > 0:
            reason = f"its gradient norm {norm:.3g} is {norm / usual:.3g} times the usual one"
    progress.norms = [*progress.norms, norm][-window:]
    return reason


@dataclass
class Tally:
    """What the batches of a step add up to: numbers by name; load `(E,)` of each bank of each MoE
    layer, and its router's entropy summed over the tokens, as `losses.figures_of` lists them.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)

    def add(self, loss: Loss) -> None:
        found = {"loss": loss.value, **loss.parts}
        if loss.num_right is not None:
            found["accuracy"] = loss.num_right
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.loads = _added(self.loads, loss.loads_LE)
        self.entropies = _added(self.entropies, loss.entropies_L)

    def of_all(self, ranks: Ranks) -> Tally:
        """What the batches of all ranks add up to."""
        names = sorted(self.sums)  # the same on all ranks, whichever came first
        found = [self.sums[name] for name in names]
        totals = iter(ranks.all_reduce([*found, *self.loads, *self.entropies]))
        sums = dict(zip(names, totals))
        loads = [next(totals) for _ in self.loads]
        return Tally({name: sums[name] for name in self.sums}, loads, list(totals))


def _added(sums: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(sums, more, strict=True)] if sums else more


def _backward(parts: Parts, window: list[Batch], step: int, scale: float) -> Tally:
    """Gradients of a window; numbers to be recorded, and what its routers did: of the whole
    window, of which this rank computes its share. One process waits for nothing: the numbers are
    still on their device."""
    tally = Tally()
    costs = [batch.num_patches for batch in window]
    own = dealt(list(enumerate(window)), costs, parts.ranks)
    measured = parts.measure(window)
    for place, batch in own:
        flat = to_device(batch, parts.model.device)
        with parts.dropout.during(step, place):
            loss = parts.loss(parts.model, flat, scale=scale, share=1 / len(window), **measured)
            if place == own[-1][0]:
                parts.gradients.expect_last()
            if loss.total.requires_grad:  # not of text alone where only vision's parts are trained
                loss.total.backward()
        tally.add(loss)
    parts.gradients.complete()
    tally = tally.of_all(parts.ranks)
    if "accuracy" in tally.sums:
        num_trained = sum(batch.num_trained for batch in window)
        tally.sums["accuracy"] = tally.sums["accuracy"].double() / num_trained
    return tally


def _on_host(numbers: dict[str, Tensor]) -> dict[str, float]:
    """All of them at once: one wait for the device."""
    device = numbers["loss"].device
    values = torch.stack([value.detach().double().to(device) for value in numbers.values()])
    return dict(zip(numbers, values.tolist()))


def _backward_and_update(
    parts: Parts, window: list[Batch], step: int, learning_rate: float
) -> tuple[Tally, dict[str, Tensor]]:
    """As `_backward`, but weights move within; the length of the gradient is one of the numbers,
    and the squared length of each parameter's comes beside them.

    A gradient that is not finite leaves its own weight as it was, and the step counts as skipped.
    """
    squares: dict[str, Tensor] = {}
    parts.optimizer.num_updates += 1

    def update(name: str, gradient: Tensor) -> None:
        squares[name] = squares_of([gradient])[0]
        if bool(squares[name].isfinite()):
            parts.optimizer.update(name, gradient, learning_rate, 1.0)

    assert len(window) == 1 and not parts.optimisation.max_grad_norm
    with parts.gradients.given_away(update):
        tally = _backward(parts, window, step, 1 / window[0].weight)
    tally.sums["grad_norm"] = length(list(squares.values()))
    return tally, squares


def trained_routers(model: ErnieModel) -> list[Router]:
    return [router for router in routers_of(model) if router.weight.requires_grad]


def _balance(model: ErnieModel, loads: list[Tensor], step_size: float) -> None:
    layers = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    banks = [
        (gate, layer.moe_statics.e_score_correction_bias[bank])
        for layer in layers
        for bank, gate in enumerate((layer.gate, layer.vision_gate))
        if gate is not None
    ]
    for (gate, bias_E), load_E in zip(banks, loads, strict=True):
        if gate.weight.requires_grad:  # a frozen router keeps its bias
            balance.update_correction_bias(bias_E, load_E, step_size)
