"""Direct preference optimisation, full or LoRA: two answers to a prompt, of which one is preferred.

    data -> how many steps -> log-probabilities of the reference -> (as in supervised fine-tuning)

The reference is the model before training. It is asked about every pair that the run will see
before anything is trained, and its numbers are kept on disk (`erniekit.reference`). Rows hold
several pairs, each prompt once (`erniekit.data.preference`); the rest of the story is that of
`erniekit.recipes.sft`.
"""

from __future__ import annotations

from functools import partial

import torch

from ernie.model import ErnieModel
from erniekit.config import Run, resolved
from erniekit.evaluate import evaluate_pairs
from erniekit.losses import Loss
from erniekit.preference import Objective, Pairs, preference
from erniekit.recipes import sft
from erniekit.reference import References
from erniekit.session import Method


def run(run: Run, device: str) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    return sft.train(run, device, method(run, device))


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The preference loss, and its value and rewards on held-out pairs.

    `is_kept` as in `References`; the reference of `reference_free` is zero for every answer.
    """
    p = run.preferences
    objective = Objective(p.loss_type, p.beta, p.label_smoothing, p.normalize_logps)
    references = References(run, device, is_kept=is_kept) if not p.reference_free else None

    def loss(model: ErnieModel, batch: Pairs, **options) -> Loss:
        zeros = torch.zeros(len(batch.pairs_P4), 2, dtype=torch.float64, device=model.device)
        reference_P2 = references.of(batch) if references is not None else zeros
        return preference(
            model,
            batch,
            reference_P2,
            objective=objective,
            terms=sft.terms(run),
            chunk_size=run.model.loss_subbatch_seqlen,
            **options,
        )

    evaluate = partial(evaluate_pairs, loss=loss)
    if references is None:
        return Method(loss, evaluate)
    return Method(loss, evaluate, references.fill)
