"""Direct preference optimisation, full or LoRA: two answers to a prompt, of which one is preferred.

    data -> how many steps -> log-probabilities of the reference -> (as in supervised fine-tuning)

The reference is the model before training. It is asked about every pair that the run will see
before anything is trained, and its numbers are kept on disk (`erniekit.reference`). Rows hold
several pairs, each prompt once (`erniekit.data.preference`); the rest of the story is that of
`erniekit.recipes.sft`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from erniekit.config import Preferences, Run, resolved
from erniekit.data.batch import Batch
from erniekit.device_batch import Pairs, to_device
from erniekit.evaluate import evaluate_judged
from erniekit.losses import Loss
from erniekit.method import Method
from erniekit.parallel.deal import shared
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.preference import answer_lengths, preference, sequence_log_probs
from erniekit.preference_losses import Objective, gains
from erniekit.recipes import sft
from erniekit.reference import References, reference_of


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    # Every rank asks the reference about every pair; one keeps the answers.
    return sft.train(run, device, method(run, device, is_kept=ranks.is_first), ranks)


def objective_of(p: Preferences) -> Objective:
    """The method that the keys of a run describe."""
    return Objective(
        p.loss_type,
        p.beta,
        p.label_smoothing,
        p.normalize_logps,
        p.simpo_gamma,
        p.dpop_lambda,
        p.pref_loss_ratio,
        1.0 if p.loss.has_sft else p.sft_loss_ratio,
    )


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The preference loss, and its value and rewards on held-out pairs.

    `is_kept` as in `References`; without a reference it is zero for every answer.
    """
    objective, chunk_size = objective_of(run.preferences), run.model.loss_subbatch_seqlen
    has_reference = objective.row.uses_reference and not run.preferences.reference_free
    references = References(run, device, is_kept=is_kept) if has_reference else None
    asked = partial(reference_of, references)

    def loss(model: ErnieModel, batch: Pairs, **options) -> Loss:
        return preference(
            model,
            batch,
            asked(batch),
            objective=objective,
            terms=sft.terms(run),
            chunk_size=chunk_size,
            **options,
        )

    def measure(model: ErnieModel, batches: Sequence[Batch], ranks: Ranks) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if objective.sft_weight:
            found["sft_scale"] = 1 / sum(map(_num_chosen, batches))
        if objective.row.uses_baselines:
            found["baseline_2"] = baselines(model, batches, asked, objective, ranks, chunk_size)
        return found

    evaluate = partial(evaluate_judged, loss=loss, measure=measure)
    if references is None:
        return Method(loss, evaluate, measure=measure)
    return Method(loss, evaluate, references.fill, measure, references)


def _num_chosen(batch: Batch) -> int:
    """Trained tokens of the chosen answers."""
    assert batch.pairs_P4 is not None
    stretches = (batch.labels_T[chosen:rejected] for _, chosen, rejected, _ in batch.pairs_P4)
    return sum(int((labels != UNTRAINED).sum()) for labels in stretches)


@torch.no_grad()
def baselines(
    model: ErnieModel,
    batches: Sequence[Batch],
    reference_of: Callable[[Pairs], Tensor],
    objective: Objective,
    ranks: Ranks = ALONE,
    chunk_size: int = 128,
) -> Tensor:
    """Mean gain of chosen and of rejected answers over these batches, not below 0; float64 `(2,)`.

    One more forward pass over the step, so that it means the same however it is cut into batches.
    """
    total_2 = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch, counts in shared(batches, ranks):
        pairs = to_device(batch, model.device)
        assert isinstance(pairs, Pairs)
        policy_P2 = sequence_log_probs(model, pairs, chunk_size=chunk_size)
        gain_P2 = gains(policy_P2, reference_of(pairs), answer_lengths(pairs), objective)
        total_2 += counts * gain_P2.sum(0)
    (total_2,) = ranks.all_reduce([total_2])
    return (total_2 / sum(len(batch.keys) for batch in batches)).clamp(min=0)
