"""Loss, perplexity and token accuracy on held-out data; loss and rewards of judged answers.

Every trained token (every judged answer or pair) counts the same, whatever row or batch it is in.
Logits are made a few rows at a time, as in training, so the accuracy costs nothing extra.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from ernie.attention import packed_causal
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from erniekit.config import Run
from erniekit.data.batch import Batch
from erniekit.data.stream import Stream
from erniekit.device_batch import Flat, to_device
from erniekit.losses import ROUTER_LOSSES, Loss, hidden_of, score_targets
from erniekit.parallel.deal import shared
from erniekit.parallel.ranks import ALONE, Ranks

T = TypeVar("T")


def in_eval_mode(function: Callable[..., T]) -> Callable[..., T]:
    """The same function of a model and more, with the model in evaluation mode: routers have no
    capacity there.
    """

    @wraps(function)
    def quietly(model: ErnieModel, *args: Any, **options: Any) -> T:
        was_training = model.training
        model.eval()
        try:
            return function(model, *args, **options)
        finally:
            model.train(was_training)

    return quietly


def eval_batches(run: Run, eval_stream: Stream) -> Iterator[Batch]:
    """The batches of an evaluation."""
    limit = run.training.max_evaluate_steps
    batches = eval_stream.batches(run.training.batch_size, end=eval_stream.epoch_size)
    return islice(batches, limit if limit > 0 else None)


@in_eval_mode
@torch.no_grad()
def evaluate(
    model: ErnieModel,
    batches: Iterable[Batch],
    chunk_size: int,
    ranks: Ranks = ALONE,
    bytes_V: np.ndarray | None = None,
) -> dict[str, float]:
    """eval_loss (mean over tokens), eval_ppl, eval_accuracy, eval_tokens and eval_seconds.

    With `bytes_V`, how many bytes of text each token stands for, eval_bits_per_byte too: the loss
    of all predicted tokens over their bytes, which compares models of different vocabularies. All
    ranks are given the same batches and answer with the same numbers, of all of them.
    """
    start, total, num_right, num_tokens, num_bytes = time.monotonic(), 0.0, 0, 0, 0
    for batch, counts in shared(batches, ranks):
        flat = to_device(batch, model.device)
        assert isinstance(flat, Flat), "pairs have an evaluation of their own"
        hidden_TD = hidden_of(model, flat, packed_causal(flat.cu_seqlens_S1, flat.lengths))
        trained = flat.labels_T != UNTRAINED
        targets_N = flat.labels_T[trained]
        log_probs_N, is_top_N = score_targets(model, hidden_TD[trained], targets_N, chunk_size)
        total -= counts * float(log_probs_N.double().sum())
        num_right += counts * int(is_top_N.sum())
        num_tokens += counts * len(targets_N)
        if bytes_V is not None:
            labels_T = batch.labels_T
            num_bytes += counts * int(bytes_V[labels_T[labels_T != UNTRAINED]].sum())
    sums = _summed(ranks, total, num_right, num_tokens, num_bytes)
    total, num_right, num_tokens, num_bytes = sums[0], *map(int, sums[1:])
    loss = total / max(num_tokens, 1)
    return {
        "eval_loss": loss,
        "eval_ppl": math.exp(min(loss, 700.0)),
        **({"eval_bits_per_byte": total / math.log(2) / num_bytes} if num_bytes else {}),
        "eval_accuracy": num_right / max(num_tokens, 1),
        "eval_tokens": num_tokens,
        "eval_seconds": time.monotonic() - start,
    }


@in_eval_mode
@torch.no_grad()
def evaluate_judged(
    model: ErnieModel,
    batches: Iterable[Batch],
    loss: Callable[..., Loss],
    measure: Callable[..., dict[str, Any]] = lambda model, batches, ranks: {},
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """eval_loss and what the loss tells (eval_rewards_* and so on) of judged answers, means over
    all of them; eval_pairs or eval_answers, eval_tokens and eval_seconds.

    `loss(model, batch, scale=, share=, **measured)` and `measure(model, batches, ranks)` are those
    of training, the held-out data being one large step; ranks as in `evaluate`.
    """
    start, batches = time.monotonic(), list(batches)
    num_judged = sum(len(batch.keys) for batch in batches)
    options = {"scale": 1 / max(num_judged, 1), "share": 1 / max(len(batches), 1)}
    options |= measure(model, batches, ranks) if batches else {}
    totals: defaultdict[str, float] = defaultdict(float, loss=0.0)
    for batch, counts in shared(batches, ranks):
        found = loss(model, to_device(batch, model.device), **options)
        totals["loss"] += counts * float(found.value)
        for name, value in found.parts.items():
            if name not in ROUTER_LOSSES:
                totals[name] += counts * float(value)
    sums = _summed(ranks, *totals.values())
    unit = batches[0].unit if batches else "pairs"
    return {
        **{f"eval_{name}": value for name, value in zip(totals, sums)},
        f"eval_{unit}": num_judged,
        "eval_tokens": sum(batch.num_trained for batch in batches),
        "eval_seconds": time.monotonic() - start,
    }


def _summed(ranks: Ranks, *numbers: float) -> list[float]:
    """The sum over the ranks of each number."""
    return ranks.all_reduce([torch.tensor(numbers, dtype=torch.float64)])[0].tolist()
