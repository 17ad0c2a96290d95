"""The network equals transformers' in float32: every layer, routing, logits, greedy tokens.

The reference models are random and of odd shapes; every row of the table bends one thing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import ernie
from ernie.attention import packed_causal
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.moe.router import Routing
from ernie.rope import rotary_tables
from tests.helpers import hf_dense, hf_moe, saved

ROWS = {
    "dense": (hf_dense, {}),
    "dense, every head its own key": (hf_dense, {"num_key_value_heads": 6}),
    "dense, untied, biased": (hf_dense, {"tie_word_embeddings": False, "use_bias": True}),
    "dense, wide head": (hf_dense, {"head_dim": 64, "num_attention_heads": 2}),
    "moe": (hf_moe, {"tie_word_embeddings": False}),
    "moe, no shared expert": (hf_moe, {"moe_num_shared_experts": 0}),
    "moe, tied, one shared": (hf_moe, {"moe_num_shared_experts": 1}),
    "moe, every second layer": (hf_moe, {"moe_layer_interval": 2, "moe_layer_end_index": 2}),
    "moe, all experts chosen": (hf_moe, {"moe_k": 8}),
}


def pair(row: str, folder: Path, seed: int = 0) -> tuple[PreTrainedModel, ErnieModel]:
    """A random transformers model, and ours as the real loader reads its folder; float32."""
    make, sizes = ROWS[row]
    theirs = make(seed, **sizes)
    return theirs, ernie.load(saved(theirs, folder), dtype=torch.float32)


@pytest.mark.parametrize("row", ROWS)
def test_every_layer_and_the_logits_equal_transformers(row: str, tmp_path: Path) -> None:
    theirs, ours = pair(row, tmp_path)
    ids = torch.randint(0, 199, (41,))
    with torch.no_grad():
        reference = theirs(ids[None], output_hidden_states=True)
        routings: list[Routing | None] = []
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        x = ours.model.embed_tokens(ids)
        rotary = ours.rotary(torch.arange(len(ids)))
        for block, expected in zip(ours.model.layers[:-1], reference.hidden_states[1:]):
            x, routing = block(x, rotary, packed_causal(bounds))
            routings.append(routing)
            worst = (x - expected[0]).abs().max().item()
            assert worst < 1e-4, f"{row}: layer {len(routings) - 1} is off by {worst:.2e}"
    worst = (ours.logits(ids) - reference.logits[0]).abs().max().item()
    assert worst < 1e-4, f"{row}: logits are off by {worst:.2e}"
    moe_layers = [ours.config.is_moe_layer(i) for i in range(ours.config.num_hidden_layers - 1)]
    assert [r is not None for r in routings] == moe_layers


@pytest.mark.parametrize("row", ["dense", "moe"])
def test_greedy_tokens_equal_transformers_over_64_tokens(row: str, tmp_path: Path) -> None:
    theirs, ours = pair(row, tmp_path, seed=1)
    prompt = torch.randint(0, 199, (9,))
    reference = theirs.generate(
        prompt[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(generate(ours, prompt.tolist(), max_tokens=64)) == reference[0, 9:].tolist()


def test_router_choices_equal_transformers(tmp_path: Path) -> None:
    theirs, ours = pair("moe", tmp_path)
    x = torch.randn(57, 40)
    with torch.no_grad():
        _, weights, chosen = theirs.model.layers[1].mlp.gate(x)
        mlp = ours.model.layers[1].mlp
        routing = mlp.gate(x, mlp.moe_statics.e_score_correction_bias[0])
    assert torch.equal(routing.experts_TK, chosen)
    torch.testing.assert_close(routing.weights_TK, weights, atol=1e-6, rtol=0)


def test_correction_bias_steers_the_choice_but_not_the_weight(tmp_path: Path) -> None:
    _, ours = pair("moe", tmp_path)
    gate, x = ours.model.layers[1].mlp.gate, torch.randn(20, 40)
    bias = torch.zeros(8)
    bias[5] = 10.0
    with torch.no_grad():
        routing = gate(x, bias)
    assert (routing.experts_TK == 5).any(1).all(), "expert 5 must be chosen by every token"
    chosen = routing.probs_TE.gather(1, routing.experts_TK)
    expected = chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK, expected)


@pytest.mark.parametrize("row", ["dense", "moe"])
def test_packed_sequences_equal_separate_ones(row: str, tmp_path: Path) -> None:
    _, ours = pair(row, tmp_path)
    parts = [torch.randint(0, 199, (n,)) for n in (7, 1, 19)]
    bounds = torch.tensor([0, 7, 8, 27], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(p)) for p in parts])
    with torch.no_grad():
        packed = ours.head(ours.hidden(torch.cat(parts), positions, packed_causal(bounds)))
    separate = torch.cat([ours.logits(p) for p in parts])
    worst = (packed - separate).abs().max().item()
    assert worst < 1e-4, f"packing changes the logits by {worst:.2e}"


def test_three_dimensional_rotary_with_equal_rows_is_the_one_dimensional() -> None:
    positions = torch.tensor([0, 3, 17, 4000])
    flat = rotary_tables(positions, 128, 500000.0)
    cubic = rotary_tables(positions.expand(3, -1), 128, 500000.0, temporal_pairs=20)
    for a, b in zip(flat, cubic):
        assert torch.equal(a, b)


def test_three_dimensional_rotary_takes_each_pair_from_its_own_coordinate() -> None:
    time, height, width = 5.0, 7.0, 11.0
    positions = torch.tensor([[time], [height], [width]])
    cos, _ = rotary_tables(positions, 128, 500000.0, temporal_pairs=20)
    for pair_index in range(64):
        at = time if pair_index >= 44 else (width if pair_index % 2 else height)
        angle = at * 500000.0 ** (-2 * pair_index / 128)
        assert abs(cos[0, pair_index].item() - torch.tensor(angle).cos().item()) < 1e-5, pair_index
