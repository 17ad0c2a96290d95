"""Steps on judged answers against transformers and plain torch, each a sequence by itself."""

from __future__ import annotations

import pytest
import torch

import ernie
from ernie.chat import UNTRAINED
from erniekit.data.batch import Batch, batch_of
from erniekit.data.dialogue import Sample
from erniekit.data.judged import JudgedSample
from erniekit.data.pack import Cursor
from erniekit.device_batch import Judged, to_device
from erniekit.kto import Utility, judged_log_probs, kto, usual
from tests.equivalence.test_preference import agree, sequences
from tests.helpers import hf_dense, hf_moe, saved

DESIRABLE = (True, False, False, True)
UTILITIES = (Utility(), Utility(beta=0.4, desirable_weight=1.5, undesirable_weight=0.5))


def after(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return [*prompt, *answer[:-1]], [UNTRAINED] * (len(prompt) - 1) + answer


def samples() -> list[JudgedSample]:
    """The chosen answers of the pairs, each beside the answer that follows the next prompt."""
    found, pairs = [], sequences()
    for i, (prompt, answer, _) in enumerate(pairs):
        other = Sample(*after(prompt, pairs[(i + 1) % len(pairs)][1]))
        ids, labels = after(prompt, answer)
        found.append(
            JudgedSample(
                ids, labels, num_prompt=len(prompt), is_desirable=DESIRABLE[i], other=other
            )
        )
    return found


def batches_of(cut: list[list[int]]) -> list[Batch]:
    rows = samples()
    return [batch_of([[rows[i] for i in part]], Cursor()) for part in cut]


def reference_of(batch: Judged) -> torch.Tensor:
    """Known numbers by answer, of which those of others make z positive or negative."""
    return torch.tensor([REFERENCE[key] for key in batch.keys], dtype=torch.float64)


REFERENCE: dict[bytes, tuple[float, float]] = {}


def plain(model, ids: list[int], labels: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0]
    kept = [i for i, label in enumerate(labels) if label != UNTRAINED]
    targets = torch.tensor([labels[i] for i in kept])
    return logits[kept].log_softmax(-1).gather(-1, targets[:, None]).double().sum()


def plain_loss(model, u: Utility) -> torch.Tensor:
    """Mean over the answers, from the formula of the paper."""
    gained = []
    with torch.no_grad():
        for s in samples():
            assert s.other is not None
            others = plain(model, list(s.other.token_ids), list(s.other.labels))
            gained.append(others - REFERENCE[s.key][1])
    z = torch.clamp(sum(gained) / len(gained), min=0)
    losses = []
    for s in samples():
        r = plain(model, list(s.token_ids), list(s.labels)) - REFERENCE[s.key][0]
        if s.is_desirable:
            losses.append(u.desirable_weight * (1 - torch.sigmoid(u.beta * (r - z))))
        else:
            losses.append(u.undesirable_weight * (1 - torch.sigmoid(u.beta * (z - r))))
    return torch.stack(losses).mean()


def set_reference(model, shift: float) -> None:
    """`shift` nats above what the policy says of the answers to other prompts."""
    REFERENCE.clear()
    (batch,) = batches_of([[0, 1, 2, 3]])
    judged = to_device(batch, model.device)
    assert isinstance(judged, Judged)
    with torch.no_grad():
        found = judged_log_probs(model, judged)
    for i, (key, (own, other)) in enumerate(zip(batch.keys, found.tolist())):
        REFERENCE[key] = (own + 3 * (-1) ** (i // 2), other + shift + i)


@pytest.mark.parametrize("utility", UTILITIES, ids=["plain", "weighted"])
@pytest.mark.parametrize("shift", [-7.0, 7.0], ids=["z above 0", "z at 0"])
@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_loss_and_gradients_equal_plain_ones_on_separate_sequences(
    make, shift: float, utility: Utility, tmp_path
) -> None:
    theirs = make()
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    set_reference(ours, shift)
    wanted = plain_loss(theirs, utility)
    wanted.backward()
    (batch,) = batches_of([[0, 1, 2, 3]])
    judged = to_device(batch, ours.device)
    assert isinstance(judged, Judged)
    known = usual(ours, [batch], reference_of)
    assert bool(known["usual"].divergence > 0) == (shift < 0)
    own_S = reference_of(judged)[:, 0]
    found = kto(ours, judged, own_S, scale=1 / 4, utility=utility, **known)
    found.total.backward()
    agree(theirs, ours, wanted, found.value)


def test_a_step_in_rows_of_one_is_the_step_in_one_row(tmp_path) -> None:
    """Value, gradients, z and every mean that is told."""
    model = ernie.load(saved(hf_dense(), tmp_path), dtype=torch.float32)
    set_reference(model, -7.0)
    results = []
    for cut in ([[0, 1, 2, 3]], [[0], [1, 2], [3]], [[0], [1], [2], [3]]):
        batches = batches_of(cut)
        known, told = usual(model, batches, reference_of), {}
        model.zero_grad()
        for batch in batches:
            judged = to_device(batch, model.device)
            assert isinstance(judged, Judged)
            own_S = reference_of(judged)[:, 0]
            loss = kto(model, judged, own_S, scale=1 / 4, share=1 / len(batches), **known)
            loss.total.backward()
            for name, value in {"loss": loss.value, **loss.parts}.items():
                told[name] = told.get(name, 0.0) + float(value)
        results.append((told, {n: p.grad.clone() for n, p in model.named_parameters()}))
    wanted, gradients = results[0]
    assert wanted["kl"] > 0 and wanted["rewards_accuracy"] == 0.5
    assert wanted["rewards_margin"] == pytest.approx(
        wanted["rewards_chosen"] - wanted["rewards_rejected"]
    )
    for told, others in results[1:]:
        assert told == pytest.approx(wanted, rel=1e-5)
        for key, want in gradients.items():
            worst = float((others[key] - want).abs().max() / want.abs().max().clamp(min=1e-12))
            assert worst < 1e-4, f"{key} is off by {worst:.2e}"
