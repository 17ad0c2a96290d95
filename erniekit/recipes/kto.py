"""Kahneman-Tversky optimisation, full or LoRA: single answers, each judged desirable or not.

    data -> how many steps -> log-probabilities of the reference -> (as in supervised fine-tuning)

The reference is that of `erniekit.recipes.preference`; it is asked about each answer, and about the
answer to another prompt that stands beside it (`erniekit.data.judged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ernie.model import ErnieModel
from erniekit.config import Run, resolved
from erniekit.data.batch import Batch
from erniekit.device_batch import Judged
from erniekit.evaluate import evaluate_judged
from erniekit.kto import Utility, judged_log_probs, kto, usual
from erniekit.losses import Loss
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.recipes import sft
from erniekit.reference import References, reference_of


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    return sft.train(run, device, method(run, device, is_kept=ranks.is_first), ranks)


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The loss of judged answers, and its value and rewards on held-out ones.

    `is_kept` as in `References`; the reference of `reference_free` is zero for every answer.
    """
    p, chunk_size = run.preferences, run.model.loss_subbatch_seqlen
    utility = Utility(p.beta, p.desirable_weight, p.undesirable_weight)
    references = None
    if not p.reference_free:
        references = References(run, device, is_kept=is_kept, log_probs=judged_log_probs)
    asked = partial(reference_of, references)

    def loss(model: ErnieModel, batch: Judged, **options) -> Loss:
        return kto(
            model,
            batch,
            asked(batch)[:, 0],
            utility=utility,
            terms=sft.terms(run),
            chunk_size=chunk_size,
            **options,
        )

    def measure(model: ErnieModel, batches: Sequence[Batch], ranks: Ranks) -> dict[str, Any]:
        return usual(model, batches, asked, ranks=ranks, chunk_size=chunk_size)

    evaluate = partial(evaluate_judged, loss=loss, measure=measure)
    if references is None:
        return Method(loss, evaluate, measure=measure)
    return Method(loss, evaluate, references.fill, measure, references)
