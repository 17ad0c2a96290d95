"""Every loss and update of routers against plain torch on tiny models, in float32."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ernie
from ernie.attention import packed_causal
from ernie.chat import UNTRAINED
from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.moe import balance, dispatch
from ernie.moe.router import Router, Routing, within_capacity
from ernie.mtp import MTP
from ernie.settings import ConfigError
from erniekit import losses, routing
from erniekit.build import frozen
from erniekit.cli import main
from erniekit.config import Optimisation, run_from
from erniekit.device_batch import Flat
from erniekit.evaluate import in_eval_mode
from erniekit.optim import treatments
from erniekit.report import heat, story
from tests.helpers import MOE, hf_moe, saved, some_ids

E, K = MOE["moe_num_experts"], MOE["moe_k"]


def batch_of(lengths: list[int]) -> Flat:
    """Documents in one row, every token but the last input of each with a label."""
    ids = [some_ids(n + 1, MOE["vocab_size"], seed=n) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs, labels = (torch.tensor([i for d in ids for i in d[s : s + len(d) - 1]]) for s in (0, 1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Flat(inputs, labels, positions, bounds)


# --- the losses of a step, through transformers' own forward pass ---


def router_inputs(theirs, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(router weight, its input) of each MoE layer of transformers' model, with its graph."""
    found = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, args, _: found.append(
                (gate.weight, args[0].reshape(-1, gate.weight.shape[1]))
            )
        )
        for layer in theirs.model.layers
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")
    ]
    theirs(ids[None])
    for hook in hooks:
        hook.remove()
    return found


TERMS = {
    "aux_loss": losses.Terms(load_balance=0.7),
    "z_loss": losses.Terms(z=0.2),
    "orthogonal_loss": losses.Terms(orthogonal=0.3),
}


@pytest.mark.parametrize("name", list(TERMS))
def test_router_losses_and_gradients_equal_plain_ones(name: str, tmp_path: Path) -> None:
    theirs = hf_moe()
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    batch = batch_of([23])
    seen = router_inputs(theirs, batch.token_ids_T)
    assert len(seen) == 3, "three of four layers have experts"
    values = []
    for weight, x in seen:
        logits = x.float() @ weight.float().T
        probs = logits.softmax(-1)
        if name == "aux_loss":
            chosen = torch.zeros(E)
            for row in probs:  # counted one by one, without the bias
                chosen[row.topk(K).indices] += 1 / len(probs)
            values.append(E * (probs.mean(0) * chosen).sum())
        elif name == "z_loss":
            values.append((logits.exp().sum(-1).log() ** 2).mean())
        else:
            cosines = torch.stack([F.cosine_similarity(weight, w[None]) for w in weight])
            values.append(((cosines - torch.eye(E)) ** 2).mean())
    weight_of_term = {"aux_loss": 0.7, "z_loss": 0.2, "orthogonal_loss": 0.3}[name]
    expected = weight_of_term * torch.stack(values).mean()
    gates = [p for n, p in theirs.named_parameters() if n.endswith("mlp.gate.weight")]
    wanted = torch.autograd.grad(expected, gates)

    loss = losses.next_token(ours, batch, scale=0.0, terms=TERMS[name])
    assert loss.parts[name].item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(loss.value) == 0, "it is not part of the reported loss"
    own = [router.weight for router in losses.routers_of(ours)]
    for got, want in zip(torch.autograd.grad(loss.total, own), wanted, strict=True):
        gap = ((got - want).abs().max() / want.abs().max()).item()
        assert gap < 1e-3, f"off by {gap:.2e}, relative to the largest"


@pytest.mark.parametrize("name", list(TERMS))
def test_padding_says_nothing_about_routers(name: str, tmp_path: Path) -> None:
    model = ernie.load(saved(hf_moe(), tmp_path), dtype=torch.float32)
    full, missing = batch_of([23, 9]), 40
    padded = replace(
        full,
        token_ids_T=F.pad(full.token_ids_T, (0, missing)),
        labels_T=F.pad(full.labels_T, (0, missing), value=UNTRAINED),
        positions_T=torch.cat([full.positions_T, torch.arange(missing)]),
        cu_seqlens_S1=torch.cat([full.cu_seqlens_S1, torch.tensor([32 + missing]).int()]),
        num_padding=missing,
    )
    own = [router.weight for router in losses.routers_of(model)]
    found = []
    for batch in (full, padded):
        loss = losses.next_token(model, batch, scale=0.1, terms=TERMS[name])
        numbers = [loss.value, *loss.parts.values(), *loss.entropies_L]
        found.append([*numbers, *torch.autograd.grad(loss.total, own), *loss.loads_LE])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_depths", [1, 2])
def test_multi_token_loss_of_packed_documents_equals_loops(num_depths: int) -> None:
    """Position by position: from its hidden state and the next token, the one after; at the next
    depth from what came out and the token after; only within its document, and as the mean over the
    depths. Shares embedding, norm and head with the main model.
    """
    config = replace(TINY["tiny-moe"], num_nextn_predict_layers=num_depths)
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=2)
    lengths = [7, 1, 12, 2]
    batch = batch_of([min(n, 50) for n in lengths])
    batch.token_ids_T.clamp_(max=config.vocab_size - 1)
    batch.labels_T.clamp_(max=config.vocab_size - 1)
    batch.labels_T[3] = UNTRAINED
    total = torch.zeros(())
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        ids, labels = batch.token_ids_T[part], batch.labels_T[part]
        bounds, positions = torch.tensor([0, n], dtype=torch.int32), torch.arange(n)
        hidden = model.hidden(ids, positions, packed_causal(bounds))
        for depth, block in enumerate(model.model.mtp, 1):
            assert isinstance(block, MTP)
            # What follows the last inputs is not known here, and they predict nothing.
            embedded = block.emb_norm(model.model.embed_tokens(ids.roll(-depth)))
            both = torch.cat((embedded, block.hidden_norm(hidden)), dim=-1)
            hidden, _ = block.block(
                block.linear_proj(both), model.rotary(positions), packed_causal(bounds)
            )
            logits = model.head(hidden)
            for t in range(n - depth):
                if int(labels[t + depth]) != UNTRAINED:
                    total = total - logits[t].log_softmax(-1)[labels[t + depth]] / num_depths
        start += n
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    want = torch.autograd.grad(0.3 * total, list(named.values()), allow_unused=True)
    found = losses.next_token(model, batch, scale=1.0, terms=losses.Terms(multi_token=0.3))
    assert found.parts["mtp_loss"].item() == pytest.approx(0.3 * total.item(), rel=1e-5)
    plain = losses.next_token(model, batch, scale=1.0)
    got = torch.autograd.grad(found.total - plain.total, list(named.values()), allow_unused=True)
    for name, a, b in zip(named, got, want, strict=True):
        if b is not None:
            gap = ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()
            assert gap < 1e-3, f"{name} is off by {gap:.2e}, relative to the largest"


def test_balance_of_tokens_reaches_the_tokens_after_next() -> None:
    """With a budget of twice the trained tokens, half of the gradient: of both losses."""
    model = ErnieModel(replace(TINY["tiny-moe"], num_nextn_predict_layers=1), dtype=torch.float32)
    model.init_weights(seed=2)
    batch = batch_of([7, 12])
    batch.token_ids_T.clamp_(max=model.config.vocab_size - 1)
    batch.labels_T.clamp_(max=model.config.vocab_size - 1)
    plain = losses.next_token(model, batch, scale=1.0, terms=losses.Terms(multi_token=0.3))
    half = losses.next_token(
        model, batch, scale=1.0, balance_factor=0.5,
        terms=losses.Terms(multi_token=0.3, balance="budget"),
    )  # fmt: skip
    assert float(half.parts["mtp_loss"]) == float(plain.parts["mtp_loss"]) > 0
    named = [p for name, p in model.named_parameters() if ".mtp" in name and p.requires_grad]
    whole, got = (
        torch.autograd.grad(loss.total, named, allow_unused=True) for loss in (plain, half)
    )
    assert sum(g is not None for g in whole) > 5
    for a, b in zip(got, whole, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b / 2, rtol=1e-5, atol=1e-8)


# --- updates beside the optimizer ---


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_the_decoupled_update_is_the_gradient_of_the_loss(num_groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 13, requires_grad=True)
    value = balance.orthogonal_loss(weight, num_groups)
    by_hand = [
        (F.cosine_similarity(weight[i], weight[j], dim=0) - int(i == j)) ** 2
        for i in range(8)
        for j in range(8)
        if i * num_groups // 8 == j * num_groups // 8
    ]
    assert value.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, weight)
    updated = weight.detach().clone()
    balance.update_orthogonal(updated, 0.25, num_groups)
    torch.testing.assert_close(updated, weight.detach() - 0.25 * gradient, atol=1e-6, rtol=1e-5)


@pytest.fixture
def words(tiny, data: Path, tmp_path: Path):
    """A function from settings to the words of a short run of a tiny mixture of experts."""

    def make(**more: object) -> list[str]:
        values = {
            "model_name_or_path": tiny("tiny-moe"),
            "train_dataset_path": data / "train.jsonl",
            "output_dir": tmp_path / "out",
            "fine_tuning": "Full",
            "max_seq_len": 96,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "moe_use_aux_free_update_coef": 0,
            "moe_aux_loss_lambda": 0,
            "save_strategy": "no",
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def run(words: list[str], output: Path) -> dict[str, torch.Tensor]:
    """Weights after a run, as `ernie.load` reads them in float32 (routers are saved exactly)."""
    assert main(["train", *words, f"output_dir={output}"]) == 0
    return dict(ernie.load(output, dtype=torch.float32).named_parameters())


@pytest.mark.parametrize(
    ("update", "step_size", "num_groups"),
    [("decoupled", 0.5, 1), ("decoupled_lr", 0.5 * 1e-2, 1), ("decoupled", 0.5, 4)],
)
def test_a_step_moves_routers_by_the_decoupled_gradient(
    update: str, step_size: float, num_groups: int, words, grouped: Path, tmp_path: Path
) -> None:
    """W of AdamW alone, minus the step times the gradient there; nothing else moves."""
    usual = {"model_name_or_path": grouped} if num_groups > 1 else {}
    without = run(words(**usual), tmp_path / "without")
    more = usual | {"moe_orthogonal_loss_lambda": 0.5, "moe_orthogonal_update": update}
    more |= {"moe_group_orthogonal_loss": num_groups > 1}
    if update == "decoupled_lr":  # by its other name
        del more["moe_orthogonal_update"]
        more["use_ortho_loss_callback"] = "true"
    updated = run(words(**more), tmp_path / "with")
    for name, weight in without.items():
        if not name.endswith("mlp.gate.weight"):
            assert torch.equal(updated[name], weight), name
            continue
        weight = weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(balance.orthogonal_loss(weight, num_groups), weight)
        moved = updated[name] - weight
        gap = (
            (moved + step_size * gradient).abs().max() / (step_size * gradient.abs().max())
        ).item()
        assert gap < 1e-3, f"{name} is off by {gap:.2e} of the step"


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_keys_of_routers_are_told_to_be_without_effect_in_a_dense_model(
    name: str, tiny, words, tmp_path: Path, capsys
) -> None:
    keys = {"moe_gate_lr_ratio": 0.5, "moe_z_loss_lambda": 1e-3, "moe_capacity": 2}
    more = {"model_name_or_path": tiny(name), "max_steps": 1}
    assert main(["train", *words(**keys, **more)]) == 0
    told = re.findall("without effect here: (.*)", capsys.readouterr().out)
    dense = ", ".join(f"{key} (a dense model)" for key in sorted(keys))
    assert [", ".join(sorted(line.split(", "))) for line in told] == [dense] * (
        name == "tiny-dense"
    )


def test_groups_of_different_sizes_are_refused(words, tmp_path: Path, capsys) -> None:
    more = {"moe_orthogonal_loss_lambda": 0.5, "moe_group_orthogonal_loss": "true"}
    assert main(["train", *words(**more)]) == 2
    assert "divides experts into moe_k=3 groups, but there are 8" in capsys.readouterr().err


def test_the_routing_bias_moves_once_a_step_by_the_load_of_the_window(
    words, tmp_path: Path
) -> None:
    """Loads of all batches of the step are added first."""
    more = {"moe_use_aux_free_update_coef": 0.25, "gradient_accumulation_steps": 3, "max_steps": 1}
    weights = run(words(**more), tmp_path / "out")
    (record,) = [json.loads(s) for s in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    biases = [p for n, p in weights.items() if n.endswith("e_score_correction_bias")]
    for bias, load in zip(biases, record["moe_loads"], strict=True):
        mean = sum(load) / len(load)
        want = [0.25 * ((mean > n) - (mean < n)) for n in load]
        torch.testing.assert_close(bias[0], torch.tensor(want))


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({"stage": "PT"}, 0.001),
        ({"stage": "VL-SFT"}, 0.001),
        ({"stage": "SFT"}, 0),
        ({"stage": "DPO"}, 0),
        ({"stage": "SFT", "moe_use_aux_free_update_coef": 0.01}, 0.01),
        ({"stage": "PT", "moe_use_aux_free_update_coef": 0}, 0),
        ({"stage": "PT", "fine_tuning": "LoRA"}, 0),
    ],
)
def test_fine_tuning_leaves_the_routing_bias_unless_told(given: dict, step: float) -> None:
    """As ERNIEKit does: its trainers of text have no such update."""
    assert run_from({"fine_tuning": "Full"} | given).bias_step == step


def test_the_gate_has_a_learning_rate_of_its_own(words, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate in size, for weights with a gradient."""
    start = dict(ernie.load(run_from(dict(w.split("=") for w in words())).model.model_name_or_path,
                            dtype=torch.float32).named_parameters())  # fmt: skip
    more = {"moe_gate_lr_ratio": 0.01, "adam_epsilon": 1e-20}
    after = run(words(**more), tmp_path / "out")
    gates = [n for n in start if n.endswith("mlp.gate.weight")]
    for name in gates:
        step = (after[name] - start[name]).abs().max().item()
        assert step == pytest.approx(1e-4, rel=1e-3), f"{name} moved by {step:.2e}"
    other = "model.layers.1.self_attn.q_proj.weight"
    assert (after[other] - start[other]).abs().max().item() > 5e-3
    rules = treatments(start, Optimisation(moe_gate_lr_ratio=0.01), num_layers=4)
    assert {n for n, rule in rules.items() if rule.factor != 1} == set(gates)


# --- frozen parts ---


def test_frozen_parts_stay_bit_for_bit_and_the_rest_moves(words, tmp_path: Path) -> None:
    run_words = words(max_steps=2, moe_use_aux_free_update_coef=0.5)
    base = run_from(dict(w.split("=") for w in run_words)).model.model_name_or_path
    start = dict(ernie.load(base, dtype=torch.float32).named_parameters())
    more = "router,experts,embeddings,model.layers.0.*"
    after = run([*run_words, f"freeze_parameters={more}"], tmp_path / "out")
    for name, weight in after.items():
        is_frozen = (
            ".mlp.gate." in name or ".mlp.experts." in name or "lm_head" in name
            or "embed_tokens" in name or "layers.0." in name or "correction_bias" in name
            or ".mtp." in name
        )  # fmt: skip
        before = start[name] if name.endswith("gate.weight") else start[name].bfloat16().float()
        assert torch.equal(weight, before) == is_frozen, name


def test_words_that_freeze_nothing_are_refused() -> None:
    names = dict(ErnieModel(TINY["tiny-dense"], device="meta").named_parameters())
    assert frozen(names, ("attention",)) == {n for n in names if ".self_attn." in n}
    assert frozen(names, ("*embed*", "*norm*")) == {n for n in names if "embed" in n or "norm" in n}
    for word in ("router", "model.layer.*"):
        with pytest.raises(ConfigError, match="means no parameter of this model"):
            frozen(names, (word,))


# --- capacity ---


def slow_twin(experts: list[list[int]], num_experts: int, capacity: int) -> list[list[bool]]:
    """Choice by choice, as the order says."""
    taken = [0] * num_experts
    kept = [[False] * len(row) for row in experts]
    for choice in range(len(experts[0])):
        for token, row in enumerate(experts):
            if taken[row[choice]] < capacity:
                kept[token][choice] = True
                taken[row[choice]] += 1
    return kept


@pytest.mark.parametrize("capacity", [0, 1, 5, 9, 1000])
def test_choices_over_capacity_are_those_of_the_slow_twin(capacity: int) -> None:
    torch.manual_seed(capacity)
    experts = (torch.randn(40, 6) + torch.arange(6) / 3).topk(3).indices
    kept = within_capacity(experts, 6, capacity)
    assert kept.tolist() == slow_twin(experts.tolist(), 6, capacity)
    counts = torch.zeros(6).index_add_(0, experts.flatten(), kept.flatten().float())
    assert counts.max() <= capacity


def test_every_expert_takes_a_token_however_few_there_are() -> None:
    moe = ErnieModel(TINY["tiny-moe"]).model.layers[-1].mlp.train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe.gate.capacity = 1.0
    for num_tokens in (1, 3):
        _, routing = moe(torch.randn(num_tokens, TINY["tiny-moe"].hidden_size))
        assert routing.kept_TK.any(0).any() and routing.weights_TK.sum() > 0.5


def routed(router: Router, x: torch.Tensor, bias: torch.Tensor) -> tuple[Routing, torch.Tensor]:
    """Ours, and weights of the choices by the formula."""
    found = router(x, bias)
    probs = (x @ router.weight.T).softmax(-1)
    experts = (probs + bias).topk(router.top_k).indices
    if router.capacity is None:
        kept = torch.ones_like(experts, dtype=torch.bool)
    else:
        most = int(router.capacity * len(x) // len(bias))
        kept = torch.tensor(slow_twin(experts.tolist(), len(bias), most))
    chosen = probs.gather(1, experts) * kept
    return found, chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-12)


def test_what_is_dropped_counts_nowhere_and_the_rest_shares_its_weight() -> None:
    torch.manual_seed(1)
    config: ErnieConfig = TINY["tiny-moe"]
    router = Router(config, 8)
    torch.nn.init.normal_(router.weight, std=0.3)
    x, bias = torch.randn(64, config.hidden_size), 0.05 * torch.randn(8)
    without, wanted = routed(router, x, bias)
    torch.testing.assert_close(without.weights_TK, wanted)
    router.capacity = 0.8
    found, wanted = routed(router, x, bias)
    torch.testing.assert_close(found.weights_TK, wanted)
    assert found.kept_TK is not None and 0.2 < 1 - found.kept_TK.float().mean() < 0.8
    assert (found.weights_TK.sum(-1) == 0).any(), "some token has lost all its experts"
    (got,) = torch.autograd.grad((found.weights_TK**2).sum(), router.weight)
    (want,) = torch.autograd.grad((wanted**2).sum(), router.weight)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    rows = torch.randn(64 * config.moe_k, 4)

    def experts(x_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return rows[: len(x_ND)]

    out = dispatch.local(torch.zeros(64, 4), found, experts)
    gone = ~found.kept_TK.any(1)
    assert (out[gone] == 0).all() and (out[~gone] != 0).any()
    assert torch.equal(router.eval()(x, bias).weights_TK, without.weights_TK), "training only"


def test_capacity_is_of_training_alone_and_is_told(words, data: Path, tmp_path: Path) -> None:
    more = {"eval_dataset_path": data / "eval.jsonl", "evaluation_strategy": "steps",
            "eval_steps": 1, "max_steps": 2, "learning_rate": 1e-9}  # fmt: skip
    found = []
    for name, capacity in (("free", {}), ("tight", {"moe_capacity": 0.5})):
        run(words(**more, **capacity), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    for free, tight in zip(*found, strict=True):
        assert free["eval_loss"] == pytest.approx(tight["eval_loss"], abs=1e-4)
        if free["step"]:
            assert "moe_dropped" not in free and tight["moe_dropped"] > 0.5
            assert abs(free["loss"] - tight["loss"]) > 1e-4


def test_evaluation_gives_the_mode_back_after_a_failure() -> None:
    model = ErnieModel(TINY["tiny-dense"], device="meta")

    def failing(given: ErnieModel) -> None:
        assert not given.training
        raise KeyError

    with pytest.raises(KeyError):
        in_eval_mode(failing)(model)
    assert model.training


# --- figures ---


def test_figures_of_routers_equal_those_by_hand() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 5)
    probs = logits.softmax(-1)
    found = Routing(probs.topk(2).indices, probs.topk(2).values, probs, logits)
    by_hand = -sum(p * p.log() for row in probs for p in row) / torch.tensor(5.0).log()
    entropy = balance.entropy(found)
    torch.testing.assert_close(entropy, by_hand)

    idle: list[list[int]] = []
    even, skew = torch.tensor([12, 12, 12, 12, 12]), torch.tensor([60, 0, 0, 0, 0])
    for step in range(1, routing.DEAD_AFTER + 3):
        load = even if step == 2 else skew
        record = routing.figures([load, even], [entropy, entropy / 2], idle, 2, with_loads=True)
        dead = 4 if step >= routing.DEAD_AFTER + 2 else 0
        assert record["moe_dead_experts"] == dead, f"step {step}"
    assert record["moe_max_over_mean"] == 5
    assert record["moe_entropy"] == pytest.approx(0.75 * float(entropy) / 30)
    assert record["moe_layers"]["max_over_mean"] == [5, 1]
    assert record["moe_layers"]["dead_experts"] == [4, 0]
    assert record["moe_loads"] == [skew.tolist(), even.tolist()]
    assert idle[0] == [0] + [routing.DEAD_AFTER] * 4 and idle[1] == [0] * 5


def test_a_record_has_the_figures_and_about_a_hundred_have_loads(words, tmp_path: Path) -> None:
    run(words(max_steps=4, moe_use_aux_free_update_coef=1e-3), tmp_path / "out")
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        loads = record["moe_loads"]
        assert len(loads) == 3 and all(sum(layer) == 3 * record["num_tokens"] for layer in loads)
        assert record["moe_max_over_mean"] == max(max(n) * 8 / sum(n) for n in loads)
        assert 0 < record["moe_entropy"] <= 1 and record["moe_dead_experts"] == 0
    told = [s for s in range(1, 100_001) if routing.tells_loads(s, 100_000)]
    assert len(told) in range(100, 103) and told[0] == 1 and told[-1] == 100_000


def test_the_heat_maps_say_what_the_records_say(tmp_path: Path) -> None:
    """Levels of every layer's busiest expert, and of every expert; bad lines draw nothing."""
    torch.manual_seed(0)
    loads = torch.randint(0, 9, (120, 3, 4)) ** 2
    loads[:, 1, 2] = 0
    records = [
        {"step": s, "loss": 1.0, "learning_rate": 1e-3, "moe_loads": layers.tolist()}
        for s, layers in enumerate(loads, start=1)
    ]
    hostile = ["x", [], [[]], [["<b>"]], [[1, 2]], [[-1] * 4] * 3, {"a": 1}, [[float("nan")]]]
    records += [records[0] | {"step": 200 + i, "moe_loads": v} for i, v in enumerate(hostile)]
    records.append(records[119] | {"step": 300})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = story.write(tmp_path).read_text()
    assert "<b>" not in page.partition("<h2>Experts")[2].partition("</section>")[0]
    maps = [text.split() for text in re.findall(r'data-levels="([^"]*)"', page)]
    kept = heat.thinned([r for r in records if r["step"] <= 120 or r["step"] == 300])
    assert len(kept) == 48 and kept[-1]["step"] == 300
    found = torch.tensor([r["moe_loads"] for r in kept]).double()
    ratios = found / found.mean(-1, keepdim=True)

    def levels(columns: torch.Tensor) -> list[str]:
        bounds = [(0, 0.25), (0.25, 0.5), (0.5, 0.8), (0.8, 1.25), (1.25, 2), (2, 4), (4, 99)]
        names = {0.0: "0"}
        told = [
            [
                names.get(x, "")
                or str(1 + next(i for i, (a, b) in enumerate(bounds) if a <= x < b))
                for x in row
            ]
            for row in columns.T.tolist()
        ]
        return ["".join(row) for row in told]

    assert maps[0] == levels(ratios.amax(-1))
    order = ratios[-1].amax(-1).argsort(descending=True, stable=True).tolist()
    assert maps[1:] == [levels(ratios[:, n]) for n in order]
    assert maps[1 + order.index(1)][2] == "0" * 48


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"moe_capacity": 0}, "moe_capacity=0 is too small"),
        ({"moe_capacity": 2, "stage": "DPO"}, "stage=DPO compares"),
        ({"freeze_parameters": "router", "fine_tuning": "LoRA"}, "use fine_tuning: Full"),
    ],
)
def test_settings_of_routers_that_do_not_fit_say_why(more: dict, sentence: str, words) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run_from(dict(word.split("=") for word in words(**more)))


def test_a_model_without_anything_left_to_train_is_refused(words, capsys) -> None:
    assert main(["train", *words(freeze_parameters="*")]) == 2
    assert "leaves nothing to train" in capsys.readouterr().err
