"""Steps on pictures that must be the same step: against transformers, packed or apart, padded or
recomputed; and the balance of tokens and of banks beside their formulas.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernie.attention import packed_causal
from ernie.chat import UNTRAINED
from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.vision.grids import num_rows
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.processor import Picture
from erniekit import losses
from erniekit.data.batch import Batch, batch_of
from erniekit.data.dialogue import Sample
from erniekit.data.multimodal import Media
from erniekit.data.pack import Cursor
from erniekit.device_batch import to_device
from erniekit.recompute import recompute
from tests.equivalence.test_vl_model import Case, case, gradients_by_our_names, pair

CPU = torch.device("cpu")
PROMPTS = [case(7, (1, 4, 6), 9, seed=1), case(31, seed=2), case(4, (4, 4, 6), 6, seed=3)]


def sample_of(c: Case, model: ErnieModel) -> Sample:
    """The sequence of a case as training has it; the pictures' tokens and the first ones are not
    trained.
    """
    ids, labels = c.ids[:-1].tolist(), c.ids[1:].clone()
    labels[c.kinds[1:] != 0] = UNTRAINED
    labels[:3] = UNTRAINED
    labels[labels >= 200] = UNTRAINED
    return Sample(ids, labels.tolist(), media=media_of(c, ids, model.config))


def media_of(c: Case, ids: list[int], config: ErnieConfig) -> Media:
    pictures = tuple(
        Picture("image" if grid[0] == 1 else "video", rows.numpy(), grid, num_rows(grid), "")
        for grid, rows in zip(c.grids, c.patches)
    )
    positions = positions_of(ids, c.grids, config)
    return Media(pictures, positions, modality_of(ids, config), is_placeholder(ids, config))


def batch(cases: list[Case], model: ErnieModel) -> Batch:
    return batch_of([[sample_of(c, model) for c in cases]], Cursor())


def hidden_of(model: ErnieModel, one: Batch) -> Tensor:
    flat = to_device(one, CPU)
    return losses.hidden_of(model, flat, packed_causal(flat.cu_seqlens_S1))


def gradients_of(model: ErnieModel, batches: list[Batch], **options: object) -> dict[str, Tensor]:
    """Gradient of every parameter of the mean loss over the trained tokens of all batches."""
    model.zero_grad(set_to_none=True)
    scale = 1 / sum(b.num_trained for b in batches)
    for one in batches:
        found = losses.next_token(
            model, to_device(one, CPU), scale=scale, share=1 / len(batches), **options
        )
        found.total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict, theirs: dict, bound: float) -> None:
    """Largest difference, relative to the largest value of the tensor, and its signed mean."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.abs().max().clamp(min=1e-12)
        gap = (ours[name] - expected) / scale
        worst, bias = gap.abs().max().item(), gap.mean().item()
        assert worst < bound, f"{name} is off by {worst:.2e}, relative to its largest value"
        assert abs(bias) < bound / 10, f"{name} is biased by {bias:.2e}"


@pytest.mark.parametrize("number", [0, 2])
def test_loss_and_gradients_of_a_step_equal_transformers(number: int, tmp_path: Path) -> None:
    theirs, ours = pair("plain", tmp_path)
    c = PROMPTS[number]
    short = dataclasses.replace(c, ids=c.ids[:-1], kinds=c.kinds[:-1])
    one = batch([c], ours)
    labels = torch.from_numpy(one.labels_T)
    logits = theirs(**short.inputs).logits[0]
    reference = torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNTRAINED)
    reference.backward()
    found = losses.next_token(ours, to_device(one, CPU), scale=1 / one.num_trained)
    assert abs(float(found.value) - float(reference)) < 1e-5
    gradients = gradients_of(ours, [one])
    assert_equal(gradients, gradients_by_our_names(theirs), 1e-3)


@pytest.fixture
def model(tmp_path: Path) -> ErnieModel:
    return pair("plain", tmp_path)[1]


def test_packed_rows_equal_separate_ones(model: ErnieModel) -> None:
    packed = gradients_of(model, [batch(PROMPTS, model)])
    assert_equal(gradients_of(model, [batch([c], model) for c in PROMPTS]), packed, 1e-4)


def test_a_picture_in_a_packed_row_is_not_seen_by_its_neighbours(model: ErnieModel) -> None:
    other = dataclasses.replace(PROMPTS[0], patches=[rows + 1 for rows in PROMPTS[0].patches])
    hidden = [
        hidden_of(model, batch([first, *PROMPTS[1:]], model)).detach()
        for first in (PROMPTS[0], other)
    ]
    length = len(PROMPTS[0].ids) - 1
    assert torch.equal(hidden[0][length:], hidden[1][length:])
    assert not torch.equal(hidden[0][:length], hidden[1][:length])


def test_padding_changes_nothing(model: ErnieModel) -> None:
    rows = [[sample_of(c, model) for c in PROMPTS]]
    padded = batch_of(rows, Cursor(), fixed_size=200)
    assert len(padded.token_ids_T) == 200 and padded.positions_T.shape == (3, 200)
    plain = batch_of(rows, Cursor())
    assert padded.num_samples == plain.num_samples == 3
    assert_equal(gradients_of(model, [padded]), gradients_of(model, [plain]), 1e-5)


@pytest.mark.parametrize("granularity", [None, "full"])
def test_recomputed_gradients_are_the_same_bits(model: ErnieModel, granularity: str | None) -> None:
    batches = [batch(PROMPTS, model)]
    kept = gradients_of(model, batches)
    recompute(model, lambda part: granularity)
    again = gradients_of(model, batches)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("form", ["budget", "sample"])
def test_balance_of_tokens_is_its_formula(form: str, model: ErnieModel) -> None:
    """Gradients are those of the written-out sums; the value stays the mean over trained tokens."""
    batches, budget = [batch(PROMPTS[:2], model), batch(PROMPTS[2:], model)], 400
    terms = losses.Terms(balance=form)
    measured = losses.balanced(batches, form, budget)
    options = {"terms": terms, **measured}
    found = gradients_of(model, batches, **options)
    model.zero_grad(set_to_none=True)
    total, num_trained = 0.0, 0
    for c in PROMPTS:
        flat = to_device(batch([c], model), CPU)
        logits = model.head(hidden_of(model, batch([c], model)))
        losses_T = torch.nn.functional.cross_entropy(
            logits, flat.labels_T, ignore_index=UNTRAINED, reduction="none"
        )
        divisor = budget if form == "budget" else len(PROMPTS) * len(flat.labels_T)
        (losses_T.sum() / divisor).backward()
        total, num_trained = total + float(losses_T.sum()), num_trained + int((losses_T > 0).sum())
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(found, expected, 1e-4)
    value = sum(
        float(losses.next_token(model, to_device(b, CPU), scale=1 / num_trained, **options).value)
        for b in batches
    )
    assert abs(value - total / num_trained) < 1e-5


def test_loads_of_banks_stand_apart_and_a_bank_without_tokens_has_none(model: ErnieModel) -> None:
    with_pictures, text = batch(PROMPTS, model), batch(PROMPTS[1:2], model)
    terms = losses.Terms(load_balance=0.1, z=0.1, orthogonal=0.1)
    for one, is_text in ((with_pictures, False), (text, True)):
        found = losses.next_token(model, to_device(one, CPU), scale=1.0, terms=terms)
        text_loads, vision_loads = found.loads_LE[0::2], found.loads_LE[1::2]
        num_vision = int(one.pictures.modality_T.sum())
        assert [int(load.sum()) for load in vision_loads] == [3 * num_vision] * 2
        assert [int(load.sum()) for load in text_loads] == [3 * (one.num_tokens - num_vision)] * 2
        assert bool(num_vision) != is_text
        assert torch.isfinite(found.total)
        found.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
