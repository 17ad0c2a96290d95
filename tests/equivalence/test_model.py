"""The network equals transformers' in float32: every layer, routing, logits, greedy tokens.

The reference models are random and of odd shapes; every row of the table bends one thing.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
)

from ernie.attention import packed_causal
from ernie.config import ErnieConfig
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.moe.router import Routing
from ernie.rope import rotary_tables

DENSE = {
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "hidden_size": 48, "head_dim": 16, "intermediate_size": 88, "vocab_size": 199,
}  # fmt: skip
MOE = {
    "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 1,
    "hidden_size": 40, "intermediate_size": 72, "vocab_size": 211, "moe_num_experts": 8, "moe_k": 3,
    "moe_intermediate_size": 24, "moe_num_shared_experts": 2, "tie_word_embeddings": False,
}  # fmt: skip

ROWS = {
    "dense": (Ernie4_5Config, DENSE),
    "dense, every head its own key": (Ernie4_5Config, DENSE | {"num_key_value_heads": 6}),
    "dense, untied, biased": (
        Ernie4_5Config,
        DENSE | {"tie_word_embeddings": False, "use_bias": True},
    ),
    "dense, wide head": (Ernie4_5Config, DENSE | {"head_dim": 64, "num_attention_heads": 2}),
    "moe": (Ernie4_5_MoeConfig, MOE),
    "moe, no shared expert": (Ernie4_5_MoeConfig, MOE | {"moe_num_shared_experts": 0}),
    "moe, tied, one shared": (
        Ernie4_5_MoeConfig,
        MOE | {"moe_num_shared_experts": 1, "tie_word_embeddings": True},
    ),
    "moe, every second layer": (
        Ernie4_5_MoeConfig,
        MOE | {"moe_layer_interval": 2, "moe_layer_end_index": 2},
    ),
    "moe, all experts chosen": (Ernie4_5_MoeConfig, MOE | {"moe_k": 8}),
}


def pair(row: str, seed: int = 0) -> tuple[torch.nn.Module, ErnieModel]:
    """A random transformers model and ours with the same weights, both float32."""
    config_type, sizes = ROWS[row]
    config = config_type(**sizes)
    torch.manual_seed(seed)
    moe = config_type is Ernie4_5_MoeConfig
    theirs = (Ernie4_5_MoeForCausalLM if moe else Ernie4_5ForCausalLM)(config).float().eval()
    for name, p in theirs.named_parameters():
        # Larger than at initialisation, so that attention, routing and biases matter to the result.
        p.data = p.data + 1 if "norm" in name and p.dim() == 1 else torch.randn_like(p) * 0.15
    ours = ErnieModel(ErnieConfig.from_dict(config.to_dict()), dtype=torch.float32)
    weights = {
        k.replace("mlp.gate.moe_statics", "mlp.moe_statics"): v
        for k, v in theirs.state_dict().items()
    }
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("row", ROWS)
def test_every_layer_and_the_logits_equal_transformers(row: str) -> None:
    theirs, ours = pair(row)
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
def test_greedy_tokens_equal_transformers_over_64_tokens(row: str) -> None:
    theirs, ours = pair(row, seed=1)
    prompt = torch.randint(0, 199, (9,))
    reference = theirs.generate(
        prompt[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(generate(ours, prompt.tolist(), max_tokens=64)) == reference[0, 9:].tolist()


def test_router_choices_equal_transformers() -> None:
    theirs, ours = pair("moe")
    x = torch.randn(57, 40)
    with torch.no_grad():
        _, weights, chosen = theirs.model.layers[1].mlp.gate(x)
        mlp = ours.model.layers[1].mlp
        routing = mlp.gate(x, mlp.moe_statics.e_score_correction_bias[0])
    assert torch.equal(routing.experts_TK, chosen)
    torch.testing.assert_close(routing.weights_TK, weights, atol=1e-6, rtol=0)


def test_correction_bias_steers_the_choice_but_not_the_weight() -> None:
    _, ours = pair("moe")
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
def test_packed_sequences_equal_separate_ones(row: str) -> None:
    _, ours = pair(row)
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
