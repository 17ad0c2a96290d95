"""Dispatch, balance losses and the multi-token-prediction block, each against its formula written
out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ernie.attention import packed_causal
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.moe import balance, dispatch
from ernie.moe.experts import Experts
from ernie.moe.router import Routing


def random_routing(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    probs = logits.softmax(-1)
    weights, experts = probs.topk(top_k)
    return Routing(experts, weights / weights.sum(-1, keepdim=True), probs, logits)


def random_experts(num_experts: int, hidden: int, size: int) -> Experts:
    torch.manual_seed(1)
    experts = Experts(num_experts, hidden, size)
    for p in experts.parameters():
        p.data.normal_(0, 0.2)
    return experts


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 1), (23, 8, 3), (5, 6, 6)])
def test_local_dispatch_equals_a_loop_over_tokens(num_tokens, num_experts, top_k) -> None:
    experts, x = random_experts(num_experts, 12, 10), torch.randn(num_tokens, 12)
    routing = random_routing(num_tokens, num_experts, top_k)
    out = dispatch.local(x, routing, experts)
    for t in range(num_tokens):
        expected = torch.zeros(12)
        for expert, weight in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t]):
            gate, up = (experts.gate_up_proj[expert] @ x[t]).chunk(2)
            expected += weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(out[t], expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_dispatch_equal_those_of_its_formula() -> None:
    experts, x = random_experts(6, 12, 10), torch.randn(19, 12, requires_grad=True)
    routing = random_routing(19, 6, 3)
    weights = routing.weights_TK.requires_grad_()

    def plain() -> torch.Tensor:
        order = routing.experts_TK.flatten().argsort(stable=True)
        rows = experts(x[order // 3], routing.load_E)
        return (rows[order.argsort()].view(19, 3, 12) * weights[..., None]).sum(1)

    upstream = torch.randn(19, 12)
    wanted = (x, weights, *experts.parameters())
    ours = torch.autograd.grad(dispatch.local(x, routing, experts), wanted, upstream)
    theirs = torch.autograd.grad(plain(), wanted, upstream)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def test_load_counts_every_choice_once() -> None:
    routing = random_routing(31, 7, 2)
    by_hand = [int((routing.experts_TK == e).sum()) for e in range(7)]
    assert routing.load_E.tolist() == by_hand and sum(by_hand) == 62


def test_load_balance_loss_is_k_when_even_and_e_times_more_when_all_choose_alike() -> None:
    num_experts, top_k = 6, 2
    logits = torch.stack([torch.full((num_experts,), 0.0).scatter(0, torch.tensor(pair), 1e-4)
                          for pair in ([0, 1], [2, 3], [4, 5])])  # fmt: skip
    even = replace(
        random_routing(3, num_experts, top_k), logits_TE=logits, probs_TE=logits.softmax(-1)
    )
    assert balance.load_balance_loss(even).item() == pytest.approx(top_k, abs=1e-3)
    logits = torch.zeros(3, num_experts)
    logits[:, :2] = 30.0
    alike = replace(even, logits_TE=logits, probs_TE=logits.softmax(-1))
    assert balance.load_balance_loss(alike).item() == pytest.approx(num_experts, abs=1e-3)


def test_load_balance_gradient_pushes_busy_experts_down() -> None:
    logits = torch.zeros(4, 5, requires_grad=True)
    with torch.no_grad():
        logits[:, 3] = 2.0
    routing = Routing(torch.full((4, 1), 3), torch.ones(4, 1), logits.softmax(-1), logits)
    balance.load_balance_loss(routing).backward()
    assert (logits.grad[:, 3] > 0).all() and (logits.grad[:, [0, 1, 2, 4]] < 0).all()


def test_z_loss_equals_its_formula() -> None:
    routing = random_routing(9, 5, 2)
    by_hand = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in routing.logits_TE.tolist()]
    assert balance.z_loss(routing).item() == pytest.approx(sum(by_hand) / 9, rel=1e-5)


def test_orthogonal_loss_equals_its_formula_and_vanishes_for_orthogonal_rows() -> None:
    weight = torch.randn(5, 8)
    by_hand = 0.0
    for e in range(5):
        for f in range(5):
            cosine = F.cosine_similarity(weight[e], weight[f], dim=0).item()
            by_hand += (cosine - (e == f)) ** 2
    assert balance.orthogonal_loss(weight).item() == pytest.approx(by_hand / 25, rel=1e-4)
    assert balance.orthogonal_loss(3 * torch.eye(8)[:5]).item() < 1e-10


def test_correction_bias_moves_against_the_load() -> None:
    bias = torch.tensor([0.0, 0.5, 0.0])
    balance.update_correction_bias(bias, torch.tensor([9, 3, 6]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.6, 0.0]))


def test_multi_token_prediction_equals_its_formula() -> None:
    model = ErnieModel(TINY["tiny-moe"], dtype=torch.float32)
    model.init_weights(seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    config, block = model.config, model.model.mtp[0]
    hidden, following = torch.randn(11, config.hidden_size), torch.randint(0, 200, (11,))
    positions, bounds = torch.arange(11), torch.tensor([0, 11], dtype=torch.int32)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    with torch.no_grad():
        ours = model.hidden_after_next(following, hidden, positions, packed_causal(bounds))
        embedded = norm(model.model.embed_tokens.weight[following], block.emb_norm.weight)
        both = torch.cat((embedded, norm(hidden, block.hidden_norm.weight)), dim=-1)
        mixed = both @ block.linear_proj.weight.T
        expected, _ = block.block(mixed, model.rotary(positions), packed_causal(bounds))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert block.block.self_attn.layer == config.num_hidden_layers, "must not share a cache layer"
