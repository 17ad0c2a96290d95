"""Preference steps against transformers and plain torch, each answer a sequence of its own."""

from __future__ import annotations

import pytest
import torch

import ernie
from ernie.chat import UNTRAINED
from erniekit.lora import LoRA, add_lora, without_adapters
from erniekit.preference import Objective, Pairs, preference, sequence_log_probs
from tests.helpers import hf_dense, hf_moe, saved, some_ids

# Tokens of prompt, chosen and rejected answer of each pair.
SIZES = ((7, 5, 3), (1, 2, 9), (12, 1, 1), (4, 130, 6))


def sequences() -> list[tuple[list[int], ...]]:
    """Without id 0, whose embedding transformers takes to be padding and never trains."""
    return [
        tuple([1 + t for t in some_ids(n, 198, seed=10 * i + j)] for j, n in enumerate(sizes))
        for i, sizes in enumerate(SIZES)
    ]


def row(pairs: list) -> Pairs:
    """One row: all of the prompt but its last token, which both answers begin with."""
    ids, labels, positions, bounds = [], [], [], []
    for prompt, chosen, rejected in pairs:
        start, shared = len(ids), len(prompt) - 1
        ids += prompt[:-1]
        labels += [UNTRAINED] * shared
        positions += range(shared)
        bound = [start, len(ids)]
        for answer in (chosen, rejected):
            ids += [prompt[-1], *answer[:-1]]
            labels += answer
            positions += range(shared, shared + len(answer))
            bound.append(len(ids))
        bounds.append(bound)
    return Pairs(*(torch.tensor(values) for values in (ids, labels, positions, bounds)))


def plain_log_probs(model, pairs: list) -> torch.Tensor:
    """(P, 2) by transformers, one sequence at a time."""
    values = []
    for prompt, *answers in pairs:
        for answer in answers:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            values.append(
                logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).double().sum()
            )
    return torch.stack(values).view(-1, 2)


@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_loss_and_gradients_equal_plain_ones_on_separate_sequences(make, tmp_path) -> None:
    theirs = make()
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    ours.requires_grad_(True)
    pairs, beta, smoothing = sequences(), 0.3, 0.1
    reference = plain_log_probs(theirs, pairs).detach() + torch.linspace(-4, 4, 8).view(4, 2)
    margin = (
        beta * (plain_log_probs(theirs, pairs) - reference) @ torch.tensor([1.0, -1.0]).double()
    )
    log_sigmoid = torch.nn.functional.logsigmoid
    wanted = -((1 - smoothing) * log_sigmoid(margin) + smoothing * log_sigmoid(-margin)).mean()
    wanted.backward()
    objective = Objective(beta=beta, label_smoothing=smoothing)
    found = preference(ours, row(pairs), reference, scale=1 / 4, objective=objective)
    found.total.backward()
    difference = float((found.total - wanted).detach()) / float(wanted.detach())
    assert abs(difference) < 1e-5, difference
    for find, want in (
        (ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad),
        (
            ours.model.layers[0].self_attn.k_proj.weight.grad,
            theirs.model.layers[0].self_attn.k_proj.weight.grad,
        ),
        (ours.model.norm.weight.grad, theirs.model.norm.weight.grad),
    ):
        assert float((find - want).abs().max()) < 2e-5 * float(want.abs().max())


def test_a_row_of_pairs_equals_rows_of_one_pair(tmp_path) -> None:
    model = ernie.load(saved(hf_dense(), tmp_path), dtype=torch.float32)
    together = sequence_log_probs(model, row(sequences()))
    alone = torch.cat([sequence_log_probs(model, row([pair])) for pair in sequences()])
    assert float((together - alone).detach().abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_the_reference_of_lora_is_the_model_before_adapters(make, tmp_path) -> None:
    model = ernie.load(saved(make(), tmp_path), dtype=torch.float32)
    batch = row(sequences())
    before = sequence_log_probs(model, batch)
    add_lora(model, LoRA(rank=2, alpha=4), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.fill_(0.05)
    changed = sequence_log_probs(model, batch)
    with without_adapters(model):
        without = sequence_log_probs(model, batch)
    assert float((without - before).abs().max()) == 0.0
    assert float((changed - before).abs().max()) > 1e-3
    assert torch.equal(sequence_log_probs(model, batch), changed)
