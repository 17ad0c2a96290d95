"""Groups of answers as rows, and the batches of a round: what `erniekit.policy.policy` reads.

    prompt but its last token | last token, answer 1 | last token, answer 2 | ...

as for pairs (`erniekit.data.preference`), with any number of answers. A round is cut into passes, a
pass into steps, a step into batches; the weight of a token or a pair is its share of its *step*,
and is written into the batch.

Legend: N labelled tokens of a group or a batch, A answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ernie.chat import UNTRAINED
from erniekit.data.batch import Batch
from erniekit.data.pack import Cursor
from erniekit.data.preference import PairSample
from erniekit.policy import answer_of_label

_FLOATS = ("old_N", "reference_N", "advantage_N", "trust_N")


@dataclass
class Group:
    """A prompt and its answers; `starts` are the first positions of the answers.

    `numbers` are float32 `(N,)` by the names of `policy`. A group from a file of pairs has no part
    in the policy loss; `pair` is the better and the worse of the answers that are compared.
    """

    token_ids: list[int]
    labels: list[int]
    starts: list[int]
    pair: tuple[int, int] | None = None
    is_sampled: bool = True
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = np.zeros(self.num_labels, np.float32)
        self.numbers = dict.fromkeys(_FLOATS, zeros) | self.numbers

    @property
    def num_labels(self) -> int:
        return len(self.labels) - self.labels.count(UNTRAINED)

    @property
    def bounds(self) -> list[int]:
        return [0, *self.starts, len(self.token_ids)]

    @property
    def positions(self) -> np.ndarray:
        first = self.starts[0]
        answers = zip(self.starts, [*self.starts[1:], len(self.token_ids)])
        return np.concatenate([np.arange(first), *(np.arange(b - a) + first for a, b in answers)])

    def lengths(self) -> np.ndarray:
        """Labelled tokens of each answer, int64 `(A,)`."""
        is_labelled = np.asarray(self.labels) != UNTRAINED
        return np.add.reduceat(is_labelled.astype(np.int64), self.starts)


def sampled_group(prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> Group:
    """The answers to a prompt, each token of them with a label."""
    ids, labels = list(prompt_ids[:-1]), [UNTRAINED] * (len(prompt_ids) - 1)
    starts = []
    for answer in answers:
        starts.append(len(ids))
        ids += [prompt_ids[-1], *answer[:-1]]
        labels += answer
    return Group(ids, labels, starts)


def given_group(pair: PairSample) -> Group:
    """A pair of a file, the better answer first."""
    starts = [pair.chosen, pair.rejected]
    return Group(list(pair.token_ids), list(pair.labels), starts, (0, 1), is_sampled=False)


def best_and_worst(rewards: Sequence[float], min_gap: float) -> tuple[int, int] | None:
    """The first answer with the largest reward and the first with the smallest, if they differ by
    more than `min_gap`.
    """
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    return (best, worst) if rewards[best] - rewards[worst] > max(min_gap, 0) else None


@dataclass(frozen=True)
class Cut:
    """How a round is cut: passes, steps of a pass, batches of a step; tokens or answers alike."""

    num_passes: int
    steps_per_pass: int
    batches_per_step: int
    by_answer: bool

    @property
    def num_steps(self) -> int:
        return self.num_passes * self.steps_per_pass


def round_batches(
    groups: Sequence[Group],
    pairs: Sequence[Group],
    told: Sequence[float],
    cut: Cut,
    *,
    start: int,
    end: int,
    seed: int,
) -> Iterator[Batch]:
    """All batches of a round of sampled `groups` and given `pairs`, in the order of training.

    There are at least as many groups as batches of a pass. Every pass has an order of its own.
    `start` and `end` are the round's places in the stream of prompts.
    """
    last, number = cut.num_steps * cut.batches_per_step, 0
    for turn in range(cut.num_passes):
        order = np.random.default_rng((seed, turn)).permutation
        steps = _dealt(order(len(groups)), cut.steps_per_pass)
        pair_steps = _dealt(order(len(pairs)), cut.steps_per_pass)
        for own, given in zip(steps, pair_steps):
            step = [groups[i] for i in own]
            step_pairs = [pairs[i] for i in given]
            weights = _weights(step + step_pairs, by_answer=cut.by_answer)
            has_pairs = any(group.pair is not None for group in step + step_pairs)
            parts = _dealt(np.arange(len(step)), cut.batches_per_step)
            more = _dealt(np.arange(len(step_pairs)), cut.batches_per_step)
            for part, extra in zip(parts, more):
                number += 1
                chosen = [*part.tolist(), *(len(step) + extra).tolist()]
                members = [(step + step_pairs)[i] for i in chosen]
                at = Cursor(end) if number == last else Cursor(start, 0, number)
                own_weights = [weights[i] for i in chosen]
                yield _batch(members, own_weights, told, at, has_pairs=has_pairs)


def _dealt(order: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(order, count)


def _weights(step: Sequence[Group], *, by_answer: bool) -> list[tuple[np.ndarray, float]]:
    """Of each group of a step: the weights of its tokens, float32 `(N,)`, and of its pair."""
    sampled = [group for group in step if group.is_sampled]
    num_tokens = sum(group.num_labels for group in sampled)
    num_answers = sum(len(group.starts) for group in sampled)
    num_pairs = sum(group.pair is not None for group in step)
    found = []
    for group in step:
        lengths_A = group.lengths()
        if not group.is_sampled:
            weight_N = np.zeros(group.num_labels)
        elif by_answer:
            weight_N = np.repeat(1 / (num_answers * lengths_A), lengths_A)
        else:
            weight_N = np.full(group.num_labels, 1 / num_tokens)
        found.append((weight_N.astype(np.float32), 1 / num_pairs if group.pair else 0.0))
    return found


def _batch(
    groups: Sequence[Group],
    weights: Sequence[tuple[np.ndarray, float]],
    told: Sequence[float],
    cursor: Cursor,
    *,
    has_pairs: bool = False,
) -> Batch:
    """Groups laid one after the other.

    Of a step that `has_pairs` every batch has one, so that all ranks have the same numbers to tell:
    where no group has a pair, an answer is compared with itself, without weight.
    """
    labels_T = np.concatenate([np.asarray(g.labels, np.int64) for g in groups])
    lengths = np.concatenate([np.diff(g.bounds) for g in groups])
    cu_seqlens_S1 = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    counts_G = np.array([len(g.starts) for g in groups], np.int64)
    firsts = counts_G.cumsum() - counts_G
    pairs = [
        (first + g.pair[0], first + g.pair[1])
        for g, first in zip(groups, firsts)
        if g.pair is not None
    ]
    pair_weights = [w for g, (_, w) in zip(groups, weights) if g.pair is not None]
    if has_pairs and not pairs:
        pairs, pair_weights = [(0, 0)], [0.0]
    answer_N = answer_of_label(*map(torch.from_numpy, (labels_T, cu_seqlens_S1, counts_G)))
    return Batch(
        np.concatenate([np.asarray(g.token_ids, np.int64) for g in groups]),
        labels_T,
        np.concatenate([g.positions for g in groups]),
        cu_seqlens_S1,
        cursor,
        len(labels_T),
        int((labels_T != UNTRAINED).sum()),
        numbers={
            **{name: np.concatenate([g.numbers[name] for g in groups]) for name in _FLOATS},
            "weight_N": np.concatenate([weight_N for weight_N, _ in weights]),
            "answer_N": answer_N.numpy(),
            "counts_G": counts_G,
            "pairs_Q2": np.array(pairs, np.int64).reshape(-1, 2),
            "pair_weight_Q": np.array(pair_weights, np.float64),
            "told_K": np.array(told, np.float64),
        },
    )


def plain_batch(groups: Sequence[Group]) -> Batch:
    """Groups whose log-probabilities are asked for, without weights."""
    weights = [(np.zeros(g.num_labels, np.float32), 0.0) for g in groups]
    return _batch(groups, weights, [], Cursor())


# --- in checkpoints ---

_ARRAYS = ("token_ids_T", "labels_T", "positions_T", "cu_seqlens_S1")


def to_tensors(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Batches as named tensors, for a checkpoint within a round."""
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        arrays = {name: getattr(batch, name) for name in _ARRAYS}
        arrays |= {f"numbers.{name}": array for name, array in batch.numbers.items()}
        arrays["cursor"] = np.array(batch.cursor, np.int64)
        arrays["counts"] = np.array([batch.num_tokens, batch.num_trained], np.int64)
        found |= {f"{number:05d}.{k}": torch.from_numpy(v.copy()) for k, v in arrays.items()}
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The way back."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(tensors):
        number, _, key = name.partition(".")
        found.setdefault(number, {})[key] = tensors[name].numpy()
    return [_batch_from(arrays) for arrays in found.values()]


def _batch_from(arrays: Mapping[str, np.ndarray]) -> Batch:
    own = "numbers."
    ids_T, labels_T, positions_T, cu_seqlens_S1 = (arrays[name] for name in _ARRAYS)
    num_tokens, num_trained = arrays["counts"].tolist()
    return Batch(
        ids_T,
        labels_T,
        positions_T,
        cu_seqlens_S1,
        Cursor(*arrays["cursor"].tolist()),
        num_tokens,
        num_trained,
        numbers={k.removeprefix(own): v for k, v in arrays.items() if k.startswith(own)},
    )
