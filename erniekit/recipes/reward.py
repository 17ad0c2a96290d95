"""Reward models, full or LoRA: of two answers to a prompt the preferred one shall score higher.

    data -> how many steps -> model with a reward head -> (as in supervised fine-tuning)

Rows of pairs are those of `erniekit.recipes.preference`, read to the end of each answer; there is
no reference. What is left loads by `erniekit.reward_model.load`.
"""

from __future__ import annotations

from functools import partial

from erniekit.config import Run, resolved
from erniekit.evaluate import evaluate_judged
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.recipes import sft
from erniekit.reward_model import bradley_terry


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    return sft.train(run, device, method(run, device), ranks)


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The loss of two rewards, and how often the preferred answer has the larger one."""
    del device, is_kept  # nothing is computed before training
    loss = partial(bradley_terry, terms=sft.terms(run))
    return Method(loss, partial(evaluate_judged, loss=loss))
