"""What one kind of training has of its own: its loss, how it evaluates, what it asks for before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ernie.model import ErnieModel
from erniekit.config import Run
from erniekit.data.batch import Batch
from erniekit.loop import Progress
from erniekit.losses import Loss

if TYPE_CHECKING:
    from erniekit.reference import References


class BatchSource(Protocol):
    """Where batches come from that are made by the model as it is, instead of read from files.

    `tensors` are the batches that are left at this moment, for a checkpoint; `load` takes them over
    with its trainer_state.json.
    """

    def batches(
        self, model: ErnieModel, progress: Progress, num_steps: int
    ) -> Generator[Batch, None, None]: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Method:
    """What one kind of training has of its own; `prepare` gets every batch that will be used, to be
    looked at before the model is built.

    `loss(model, batch, scale=, share=, gradients=, **measured)`, where `measure(model, window,
    ranks)` gives what the loss must know of all batches of a step before the first of them;
    `evaluate(model, batches, ranks=)` gives numbers for `metrics.eval_line`. A `reference` that
    moves along is told when to. `count_steps` gives the steps of a run without max_steps, where
    they do not follow from packed rows.
    """

    loss: Callable[..., Loss]
    evaluate: Callable[..., dict[str, float]]
    prepare: Callable[[Iterable[Batch]], None] = lambda batches: None
    measure: Callable[..., dict[str, Any]] = lambda model, window, ranks: {}
    reference: References | None = None
    source: BatchSource | None = None  # in the place of the training stream's own batches
    count_steps: Callable[[], int] | None = None
    num_left_out: Callable[[], int] | None = None  # of an evaluation that reads no batches
    metric: str = "eval_loss"  # by which the best checkpoint is best, unless the run names one

    def metric_of(self, run: Run) -> str:
        """The number that says which checkpoint of a run is best."""
        name = run.training.metric_for_best_model or self.metric
        return name if name.startswith("eval_") else f"eval_{name}"
