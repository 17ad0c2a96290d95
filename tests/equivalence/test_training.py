"""Steps that must be the same step: against transformers, and against ourselves cut differently."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import ernie
from ernie import kernels
from ernie.attention import packed_causal
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from erniekit import losses
from erniekit.config import Optimisation, Training
from erniekit.data.batch import Batch, batch_of
from erniekit.data.dialogue import Sample
from erniekit.data.pack import Cursor
from erniekit.device_batch import Flat, to_device
from erniekit.gradients import Gradients, SummedEmbedding
from erniekit.loop import Parts, Progress, train
from erniekit.lora import LoRA, add_lora, merge_lora
from erniekit.optim import OPTIMIZERS, orthogonal, treatments
from erniekit.recompute import recompute
from tests.helpers import hf_dense, hf_moe, saved

CPU = torch.device("cpu")


def samples(lengths: list[int], seed: int = 0, vocab_size: int = 199) -> list[Sample]:
    """Random samples of which about a third is not trained."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for n in lengths:
        ids = torch.randint(0, vocab_size, (n + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[: n // 3] = UNTRAINED
        result.append(Sample(ids[:-1].tolist(), labels.tolist()))
    return result


def flat(rows: list[Sample]) -> Flat:
    return to_device(batch_of([rows], Cursor()), CPU)


def gradients_of(model: ErnieModel, batches: list[Flat], **options) -> dict[str, torch.Tensor]:
    """Gradient of every parameter of the mean loss over the trained tokens of all batches."""
    model.zero_grad(set_to_none=True)
    scale = 1 / sum(int((b.labels_T != UNTRAINED).sum()) for b in batches)
    for batch in batches:
        losses.next_token(model, batch, scale=scale, **options).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict, theirs: dict, bound: float) -> None:
    """Largest difference, relative to the largest value of the tensor, and its signed mean."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        gap = (ours[name] - expected) / expected.abs().max().clamp(min=1e-12)
        worst, bias = gap.abs().max().item(), gap.mean().item()
        assert worst < bound, f"{name} is off by {worst:.2e}, relative to its largest value"
        assert abs(bias) < bound / 10, f"{name} is biased by {bias:.2e}"


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_loss_and_gradients_of_a_step_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs = hf_dense() if kind == "dense" else hf_moe()
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    (sample,) = samples([37])
    labels = torch.tensor([UNTRAINED, *sample.labels[:-1]])  # transformers shifts by itself
    reference = theirs(torch.tensor([sample.token_ids]), labels=labels[None], use_cache=False)
    reference.loss.backward()

    batch = flat([Sample(sample.token_ids[:-1], sample.labels[:-1])])
    scale = 1 / int((batch.labels_T != UNTRAINED).sum())
    value = losses.next_token(ours, batch, scale=scale, chunk_size=5).value
    gap = abs(value.item() - reference.loss.item())
    assert gap < 1e-4 * reference.loss.item(), f"loss {value.item()}, off by {gap:.2e}"
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert_equal(gradients_of(ours, [batch], chunk_size=5), expected, 1e-4)


@pytest.fixture(params=["tiny-dense", "tiny-moe"])
def model(request) -> ErnieModel:
    made = ErnieModel(TINY[request.param], dtype=torch.float32)
    made.init_weights(seed=2)
    return made


def test_packed_samples_equal_separate_ones(model: ErnieModel) -> None:
    rows = samples([9, 1, 23, 14])
    separate = gradients_of(model, [flat([row]) for row in rows])
    assert_equal(gradients_of(model, [flat(rows)]), separate, 1e-5)


@pytest.mark.parametrize("granularity", [None, "full", "full_attn", "mlp"])
def test_recomputing_changes_nothing(model: ErnieModel, granularity: str | None) -> None:
    batch = flat(samples([9, 23]))
    terms = losses.Terms(load_balance=0.1, z=0.1, orthogonal=0.1)
    expected = gradients_of(model, [batch], terms=terms)
    recompute(model, lambda part: granularity)
    got = gradients_of(model, [batch], terms=terms)
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{name} differs"


def test_chunks_equal_full_cross_entropy(model: ErnieModel) -> None:
    batch, hidden_size = flat(samples([40])), model.config.hidden_size
    hidden = torch.randn(40, hidden_size, requires_grad=True)
    trained = batch.labels_T != UNTRAINED
    logits = hidden[trained] @ model.head_weight.T
    expected = torch.nn.functional.cross_entropy(logits, batch.labels_T[trained])
    want = torch.autograd.grad(expected, (hidden, model.head_weight))
    for chunk_size in (1, 7, 1000):
        loss = losses.ChunkedCrossEntropy.apply(
            hidden[trained], model.head_weight, batch.labels_T[trained],
            1 / int(trained.sum()), chunk_size, None,
        )  # fmt: skip
        got = torch.autograd.grad(loss, (hidden, model.head_weight))
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_multi_token_loss_looks_two_ahead_within_its_segment() -> None:
    model = ErnieModel(TINY["tiny-moe"], dtype=torch.float32)
    model.init_weights(seed=2)
    rows = samples([6, 2, 9])
    terms = losses.Terms(multi_token=0.3)
    together = losses.next_token(model, flat(rows), scale=1.0, terms=terms).parts["mtp_loss"]
    separate = [
        losses.next_token(model, flat([row]), scale=1.0, terms=terms).parts["mtp_loss"]
        for row in rows
    ]
    torch.testing.assert_close(together, torch.stack(separate).sum(), atol=1e-4, rtol=1e-5)
    # By hand, for one sample: position t with token t + 1 as input is to say token t + 2.
    row = rows[2]
    batch = flat([row])
    attend = packed_causal(batch.cu_seqlens_S1)
    hidden = model.hidden(batch.token_ids_T, batch.positions_T, attend)
    after = model.hidden_after_next(batch.token_ids_T.roll(-1), hidden, batch.positions_T, attend)
    wanted = torch.tensor([*row.labels[1:], UNTRAINED])
    expected = torch.nn.functional.cross_entropy(model.head(after), wanted, reduction="sum")
    torch.testing.assert_close(separate[2], 0.3 * expected, atol=1e-4, rtol=1e-5)


# --- whole steps of the loop ---


def trained(
    model: ErnieModel, windows: list[list[Sample]], per_step: int, steps: int, **o
) -> dict[str, torch.Tensor]:
    """Weights after some steps of the real loop over batches of the given samples."""
    o = Optimisation(**{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **o})
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    dtype = torch.float32 if o.amp_master_grad in (None, True) else torch.bfloat16
    gradients = Gradients(parameters, dtype, float32_for=(model.head_weight,))
    if model.model.embed_tokens.weight.requires_grad:
        model.model.embed_tokens = SummedEmbedding(model.model.embed_tokens, gradients)
    rules = treatments(parameters, o, num_layers=model.config.num_hidden_layers)
    optimizer = OPTIMIZERS[o.optim](parameters, rules, o, seed=3)
    loss = partial(losses.next_token, gradients=gradients, chunk_size=16)
    batches: list[Batch] = [batch_of([rows], Cursor()) for rows in windows]
    parts = Parts(model, loss, optimizer, gradients, o, steps, per_step, 1, Training())
    records: list[dict] = []
    train(parts, iter(batches), Progress(), lambda record: bool(records.append(record)))
    weights = {n: p.detach().clone() for n, p in parameters.items()}
    return weights | {"losses": torch.tensor([r["loss"] for r in records])}


def fresh(name: str) -> ErnieModel:
    model = ErnieModel(TINY[name], dtype=torch.float32)
    model.init_weights(seed=2)
    return model


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_one_batch_of_eight_equals_eight_batches_of_one(name: str) -> None:
    rows = samples([5, 30, 2, 17, 8, 11, 3, 21] * 3)
    steps = [rows[i : i + 8] for i in range(0, 24, 8)]
    # A large epsilon keeps AdamW from turning rounding of tiny gradients into whole steps.
    at_once = trained(fresh(name), steps, 1, 3, adam_epsilon=1e-3)
    in_eight = trained(fresh(name), [[row] for row in rows], 8, 3, adam_epsilon=1e-3)
    assert_equal(in_eight, at_once, 1e-4)


def test_a_full_step_equals_torch_adamw() -> None:
    rows = samples([12, 20])
    ours = trained(fresh("tiny-dense"), [rows] * 2, 1, 2, weight_decay=0.1, adam_epsilon=1e-4)
    model = fresh("tiny-dense")
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
    for _ in range(2):
        for name, gradient in gradients_of(model, [flat(rows)]).items():
            named[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
    ours.pop("losses")
    assert_equal(ours, {n: p.detach() for n, p in named.items()}, 1e-4)


def test_bfloat16_sums_and_moments_stay_close_to_float32() -> None:
    rows = [samples([24], seed=0)] * 30
    exact = trained(fresh("tiny-dense"), rows, 1, 30, amp_master_grad=True)
    lean = trained(
        fresh("tiny-dense"), rows, 1, 30, amp_master_grad=False, use_lowprecision_moment=True
    )
    first, last = exact["losses"][0], exact["losses"][-1]
    gap = (lean["losses"] - exact["losses"]).abs().max().item()
    assert last < 0.7 * first, f"the loss only went from {first:.3f} to {last:.3f}"
    assert gap < 0.05 * first, f"losses differ by up to {gap:.4f}"


def test_bfloat16_products_train_as_float32_ones() -> None:
    rows = [samples([40], seed=0)] * 30
    exact = trained(fresh("tiny-dense"), rows, 1, 30)
    try:
        kernels.bfloat16_products(True)
    except ValueError as error:
        assert "AVX512-BF16" in str(error)
        pytest.skip(str(error))
    try:
        short = trained(fresh("tiny-dense"), rows, 1, 30)
    finally:
        kernels.bfloat16_products(False)
    first = exact["losses"][0]
    gap = (short["losses"] - exact["losses"]).abs().max().item()
    assert 0 < gap < 0.05 * first, f"losses differ by up to {gap:.4f} of {first:.3f}"


def test_moments_of_8_bits_train_as_float32_ones() -> None:
    rows = [samples([24], seed=0)] * 30
    exact = trained(fresh("tiny-dense"), rows, 1, 30)
    lean = trained(fresh("tiny-dense"), rows, 1, 30, optim="adamw_8bit")
    first, last = exact["losses"][0], exact["losses"][-1]
    gap = (lean["losses"] - exact["losses"]).abs().max().item()
    assert last < 0.7 * first, f"the loss only went from {first:.3f} to {last:.3f}"
    assert gap < 0.05 * first, f"losses differ by up to {gap:.4f}"


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_updating_within_backward_changes_nothing(name: str, optim: str) -> None:
    rows = [samples([12, 20], seed=seed) for seed in range(3)]
    usual = trained(fresh(name), rows, 1, 3, max_grad_norm=0.0, optim=optim)
    within = trained(
        fresh(name), rows, 1, 3, max_grad_norm=0.0, optim=optim, optimizer_in_backward=True
    )
    for key, value in usual.items():
        assert torch.equal(within[key], value), f"{key} differs"


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_resumed_optimizer_goes_on_bit_for_bit(optim: str) -> None:
    torch.manual_seed(0)
    o = Optimisation(optim=optim, use_lowprecision_moment=True, weight_decay=0.1)
    steps = [{"w": torch.randn(8, 70), "b": torch.randn(70)} for _ in range(6)]

    def optimizer_of(weights: dict[str, torch.Tensor]):
        own = {n: torch.nn.Parameter(t.clone()) for n, t in weights.items()}
        return OPTIMIZERS[optim](own, treatments(own, o, num_layers=1), o, seed=3)

    unbroken = optimizer_of(steps[0])
    for gradients in steps[:3]:
        unbroken.step(gradients, 1e-2, 0.5)
    resumed = optimizer_of(unbroken.parameters)
    resumed.load({n: t.clone() for n, t in unbroken.tensors().items()}, unbroken.num_updates)
    for gradients in steps[3:]:
        unbroken.step(gradients, 1e-2, 0.5)
        resumed.step(gradients, 1e-2, 0.5)
    for name, parameter in unbroken.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), f"{name} differs"
    other = OPTIMIZERS["muon" if optim != "muon" else "adamw"]
    with pytest.raises(ConfigError, match="optim"):
        other(dict(unbroken.parameters), unbroken.treatments, o, seed=3).load(unbroken.tensors(), 3)


def test_muon_equals_torch() -> None:
    torch.manual_seed(0)
    shapes = {"wide": (12, 40), "tall": (40, 12)}
    ours = {n: torch.nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
    theirs = {n: torch.nn.Parameter(p.detach().clone()) for n, p in ours.items()}
    start = {n: p.detach().clone() for n, p in ours.items()}
    o = Optimisation(optim="muon", weight_decay=0.1)
    optimizer = OPTIMIZERS["muon"](ours, treatments(ours, o, num_layers=1), o, seed=0)
    peer = torch.optim.Muon(
        theirs.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        gradients = {n: torch.randn(s) for n, s in shapes.items()}
        for n, parameter in theirs.items():
            parameter.grad = gradients[n].clone()
        peer.step()
        optimizer.step(gradients, 1e-2, 1.0)
    for n in shapes:  # theirs iterates in bfloat16
        gap = (ours[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()
        assert gap < 0.03, f"{n}: steps differ by {gap:.4f} of their length"


def test_muon_leaves_vocabulary_heads_and_routers_to_adamw() -> None:
    by_adamw = ["model.embed_tokens", "lm_head", "score"]
    by_adamw += [f"model.layers.1.mlp.{gate}" for gate in ("gate", "vision_gate")]
    by_muon = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.shared_experts.gate_proj"]
    shapes = {f"{name}.weight": (3, 8) for name in by_adamw + by_muon}
    start, gradients = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(2))
    moved = {}
    for optim in ("muon", "adamw"):
        o = Optimisation(optim=optim, weight_decay=0.1, use_lowprecision_moment=False)
        own = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
        OPTIMIZERS[optim](own, treatments(own, o, num_layers=2), o, seed=0).step(gradients, 0.1, 1)
        moved[optim] = own
    alike = {n for n in shapes if torch.equal(moved["muon"][n], moved["adamw"][n])}
    assert alike == {f"{name}.weight" for name in by_adamw}


def test_orthogonal_factor_has_the_singular_vectors_of_its_matrix() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 10)
    for matrix, got in zip(stack, orthogonal(stack)):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inner = left.T @ got @ right.T
        off = (inner - inner.diag().diag()).abs().max().item()
        assert off < 1e-4, f"singular vectors are mixed by {off:.2e}"
        assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3, f"values {inner.diag()}"


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_merged_adapter_equals_adapter(name: str) -> None:
    model = fresh(name)
    plain = model.logits(range(20))
    add_lora(model, LoRA(rank=4, alpha=8), seed=0)
    assert torch.equal(model.logits(range(20)), plain), "a new adapter must change nothing"
    for key, parameter in model.named_parameters():
        if key.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = model.logits(range(20))
    assert (adapted - plain).abs().max() > 1e-2, "the adapter does nothing"
    merge_lora(model)
    worst = (model.logits(range(20)) - adapted).abs().max().item()
    assert worst < 1e-4, f"merged logits are off by {worst:.2e}"
    assert not any("lora" in key for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_adapter_gradients_equal_those_of_merged_weights(name: str) -> None:
    """dB = scale * dW A' and dA = scale * B' dW, where dW is the gradient of the merged weight."""
    model, rows = fresh(name), samples([9, 14])
    add_lora(model, LoRA(rank=2, alpha=6), seed=0)
    for key, parameter in model.named_parameters():
        if key.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    got = gradients_of(model, [flat(rows)])
    pairs = {n.removesuffix(".lora_A"): p for n, p in model.named_parameters() if "lora_A" in n}
    others = {n.removesuffix(".lora_B"): p for n, p in model.named_parameters() if "lora_B" in n}
    merge_lora(model)
    model.requires_grad_(True)
    weights = gradients_of(model, [flat(rows)])
    for home, a in pairs.items():
        dw = weights[home if home in weights else f"{home}.weight"]
        want = {f"{home}.lora_B": 3 * dw @ a.mT, f"{home}.lora_A": 3 * others[home].mT @ dw}
        assert_equal({k: got[k] for k in want}, want, 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_gradients_have_their_dtype_from_the_second_gradient_on(dtype) -> None:
    for own in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(40, dtype=own))
        gradients = Gradients({"weight": weight}, dtype)
        parts = [torch.randn(40).to(own) for _ in range(3)]
        expected = torch.zeros(40, dtype=dtype)
        for count, part in enumerate(parts):
            (weight * part).sum().backward()
            expected.add_(part)
            found = gradients.present()["weight"]
            assert torch.equal(found.to(dtype), expected), f"after {count + 1} of {own}"
            assert weight.grad is None
        assert found.dtype == dtype
        length = float(expected.double().norm())
        assert float(gradients.norm()) == pytest.approx(length, rel=1e-6)
        gradients.release()
        weight.requires_grad_(False)
