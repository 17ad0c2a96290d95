"""Loss, perplexity and token accuracy on held-out data; loss and rewards on held-out pairs.

Every trained token (every pair) counts the same, whatever row or batch it is in. Logits are made a
few rows at a time, as in training, so the accuracy costs nothing extra.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch

from ernie import kernels
from ernie.attention import packed_causal
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from erniekit.data.loader import Batch
from erniekit.loop import to_device
from erniekit.losses import Flat, Loss
from erniekit.parallel.ranks import ALONE, Ranks


@torch.no_grad()
def evaluate(
    model: ErnieModel, batches: Iterable[Batch], chunk_size: int, ranks: Ranks = ALONE
) -> dict[str, float]:
    """eval_loss (mean over tokens), eval_ppl, eval_accuracy, eval_tokens and eval_seconds.

    All ranks are given the same batches and answer with the same numbers, of all of them.
    """
    start, total, num_right, num_tokens = time.monotonic(), 0.0, 0, 0
    for batch, counts in shared(batches, ranks):
        flat = to_device(batch, model.device)
        assert isinstance(flat, Flat), "pairs have an evaluation of their own"
        attend = packed_causal(flat.cu_seqlens_S1, flat.lengths)
        hidden_TD = model.hidden(flat.token_ids_T, flat.positions_T, attend)
        trained = flat.labels_T != UNTRAINED
        hidden_ND, targets_N = model.model.norm(hidden_TD[trained]), flat.labels_T[trained]
        for rows_CD, targets_C in zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size)):
            logits_CV = kernels.linear(rows_CD, model.head_weight).float()
            chosen_C = logits_CV.gather(-1, targets_C[:, None])[:, 0]
            total += counts * float((logits_CV.logsumexp(-1) - chosen_C).double().sum())
            num_right += counts * int((logits_CV.argmax(-1) == targets_C).sum())
            del logits_CV  # before the next chunk's are made
        num_tokens += counts * len(targets_N)
    sums = _summed(ranks, total, num_right, num_tokens)
    total, num_right, num_tokens = sums[0], int(sums[1]), int(sums[2])
    loss = total / max(num_tokens, 1)
    return {
        "eval_loss": loss,
        "eval_ppl": math.exp(min(loss, 700.0)),
        "eval_accuracy": num_right / max(num_tokens, 1),
        "eval_tokens": num_tokens,
        "eval_seconds": time.monotonic() - start,
    }


@torch.no_grad()
def evaluate_pairs(
    model: ErnieModel,
    batches: Iterable[Batch],
    loss: Callable[..., Loss],
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """eval_loss, eval_rewards_* (means over pairs), eval_pairs, eval_tokens and eval_seconds.

    `loss(model, batch, scale=, share=)` is that of training; ranks as in `evaluate`.
    """
    start, num_pairs, num_tokens = time.monotonic(), 0, 0
    totals: defaultdict[str, float] = defaultdict(float)
    names = ("loss", "rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected")
    for batch, counts in shared(batches, ranks):
        found = loss(model, to_device(batch, model.device), scale=1.0, share=1.0)
        totals["loss"] += counts * float(found.value)
        for name, value in found.parts.items():
            totals[name] += counts * float(value)
        num_pairs += counts * len(batch.keys)
        num_tokens += counts * batch.num_trained
    sums = _summed(ranks, num_pairs, num_tokens, *(totals[name] for name in names))
    num_pairs, num_tokens = int(sums[0]), int(sums[1])
    totals.update(zip(names, sums[2:]))
    return {
        **{f"eval_{name}": totals[name] / max(num_pairs, 1) for name in names},
        "eval_pairs": num_pairs,
        "eval_tokens": num_tokens,
        "eval_seconds": time.monotonic() - start,
    }


def shared(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether each counts: all ranks compute equally many, because the
    shards of a model are put together by all.
    """
    rest = iter(batches)
    while group := list(islice(rest, ranks.size)):
        is_own = ranks.rank < len(group)
        yield group[ranks.rank if is_own else 0], is_own


def _summed(ranks: Ranks, *numbers: float) -> list[float]:
    """The sum over the ranks of each number."""
    return ranks.totals([torch.tensor(numbers, dtype=torch.float64)])[0].tolist()
