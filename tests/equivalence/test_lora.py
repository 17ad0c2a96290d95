"""Every form of LoRA against the PEFT library on dense models, and by hand on routed experts."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor

import ernie
from ernie.checkpoint.writer import write_file
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from erniekit import lora, lora_files
from erniekit.config import Optimisation
from erniekit.lora import STACKED, LoRA, LoRAExperts, add_lora, pairs, principal, weight_names
from erniekit.lora_targets import chosen
from erniekit.optim import AdamW, treatments
from tests.equivalence.test_vl_model import PROMPTS
from tests.helpers import hf_dense, hf_moe, hf_vl, saved

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "LoRA": LoRA(3, 6.0),
    "rsLoRA": LoRA(4, 6.0, is_rank_stabilised=True),
    "DoRA": LoRA(3, 6.0, has_magnitude=True),
    "PiSSA": LoRA(3, 6.0, is_principal=True),
    "rsPiSSA": LoRA(4, 6.0, is_rank_stabilised=True, is_principal=True),
}
IDS = [(7 * i + 3) % 199 for i in range(24)]


def of_peft(form: LoRA, folder: Path) -> tuple[peft.PeftModel, ErnieModel]:
    """A model of transformers with adapters of PEFT, and ours, both as they begin."""
    theirs = hf_dense()
    base = ernie.load(saved(theirs, folder / "base"), dtype=torch.float32)
    config = peft.LoraConfig(
        r=form.rank,
        lora_alpha=form.alpha,
        use_rslora=form.is_rank_stabilised,
        use_dora=form.has_magnitude,
        init_lora_weights="pissa" if form.is_principal else True,
        target_modules=ALL,
    )
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.save_pretrained(folder / "adapter")
    add_lora(base, form, seed=0)
    if not form.is_principal:  # whose start is the base's own, but for signs of its vectors
        found, tensors = lora_files.read_adapter(folder / "adapter", base.config, "base")
        assert found == form
        lora_files.load_adapter(base, tensors, "the file")
    return wrapped, base


def our_logits(model: ErnieModel) -> Tensor:
    """As `ErnieModel.logits`, with gradients."""
    return ErnieModel.logits.__wrapped__(model, IDS)


def loss_of(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]))


# PEFT's LoRA+ raises the rate of DoRA's magnitudes, too; ours is the paper's, of B alone.
@pytest.mark.parametrize(("name", "lora_plus_scale"), [*((n, 1.0) for n in FORMS), ("LoRA", 4.0)])
def test_forward_and_steps_equal_those_of_peft(
    name: str, lora_plus_scale: float, tmp_path: Path
) -> None:
    form = FORMS[name]
    theirs, ours = of_peft(form, tmp_path)
    plain = ernie.load(tmp_path / "base", dtype=torch.float32).logits(IDS)
    begin = our_logits(ours).detach()
    assert (begin - plain).abs().max() < 1e-4, "training does not begin with the model as it is"
    rate = 1e-2
    peers = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=lora_plus_scale,
        loraplus_weight_decay=0.0, eps=1e-3, weight_decay=0.0,
    )  # fmt: skip
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    o = Optimisation(adam_epsilon=1e-3)
    rules = treatments(trained, o, num_layers=3, lora_plus_scale=lora_plus_scale)
    optimizer = AdamW(trained, rules, o, seed=0)
    for _ in range(3):
        their_loss = loss_of(theirs(torch.tensor([IDS]), use_cache=False).logits[0])
        their_loss.backward()
        peers.step()
        peers.zero_grad()
        loss = loss_of(our_logits(ours))
        gradients = torch.autograd.grad(loss, list(trained.values()))
        optimizer.step(dict(zip(trained, gradients)), rate, 1.0)
        gap = abs(loss.item() - their_loss.item())
        assert gap < 2e-5, f"loss {loss.item()}, off by {gap:.1e}"
    with torch.no_grad():
        logits, wanted = our_logits(ours), theirs(torch.tensor([IDS])).logits[0]
    moved = float((logits - begin).abs().max())
    gap = float((logits - wanted).abs().max())
    assert gap < 2e-3 * moved, f"logits are off by {gap:.1e}, where training moved them {moved:.1e}"


# --- routed experts, by hand ---


def test_pairs_of_experts_equal_whole_weights_written_out() -> None:
    for form in (FORMS["rsLoRA"], FORMS["DoRA"]):
        model = ErnieModel(TINY["tiny-moe"], dtype=torch.float32)
        model.init_weights(seed=3, std=0.2)
        add_lora(model, form, seed=1)
        experts = next(m for m in model.modules() if isinstance(m, LoRAExperts))
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        num_experts, _, width = experts.base.gate_up_proj.shape
        counts = torch.arange(num_experts) % 3
        x = torch.randn(int(counts.sum()), width, requires_grad=True)
        got = experts(x, counts)
        expert = torch.repeat_interleave(torch.arange(num_experts), counts)

        def whole(leaf: str, layer: LoRAExperts = experts, scale: float = form.scale) -> Tensor:
            pair, weight = getattr(layer, leaf), getattr(layer.base, leaf)
            summed = weight + scale * pair.lora_B @ pair.lora_A
            if pair.lora_magnitude_vector is None:
                return summed
            norms = summed.detach().norm(dim=-1)
            return summed * (pair.lora_magnitude_vector / norms)[..., None]

        gate, up = torch.einsum("ni,noi->no", x, whole("gate_up_proj")[expert]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        want = torch.einsum("ni,noi->no", inner, whole("down_proj")[expert])
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
        trained = [x, *(p for p in experts.parameters() if p.requires_grad)]
        upstream = torch.randn_like(want)
        found, wanted = (torch.autograd.grad(y, trained, upstream) for y in (got, want))
        for a, b in zip(found, wanted, strict=True):
            worst = float((a - b).abs().max() / b.abs().max())
            assert worst < 2e-5, f"a gradient of {tuple(b.shape)} is off by {worst:.1e}"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_principal_parts_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(shape), LoRA(4, 6.0)
    a, b = principal(weight, form)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    assert float((form.scale * b @ a - best).abs().max()) < 1e-5
    torch.testing.assert_close(a @ a.T, b.T @ b)  # both have the roots of the values


# --- merging ---


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", TINY)
def test_merged_weights_equal_the_adapter(name: str, form: LoRA) -> None:
    model = ErnieModel(TINY[name], dtype=torch.float32)
    model.init_weights(seed=2)
    plain = model.logits(range(20))
    add_lora(model, form, seed=0)
    start = (model.logits(range(20)) - plain).abs().max().item()
    assert start < 1e-5, f"a new adapter changes logits by {start:.1e}"
    for _, pair, _ in pairs(model):
        for parameter in pair.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    adapted = model.logits(range(20))
    assert (adapted - plain).abs().max() > 1e-2, "the adapter does nothing"
    lora.merge_lora(model)
    worst = (model.logits(range(20)) - adapted).abs().max().item()
    assert worst < 1e-4, f"merged logits are off by {worst:.2e}"
    assert not any("lora" in key for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_pissa_adapter_beside_the_whole_base_has_twice_the_rank(name: str) -> None:
    base = ErnieModel(TINY[name], dtype=torch.float32)
    base.init_weights(seed=2)
    form, wrapped = FORMS["rsPiSSA"], copy.deepcopy(base)
    add_lora(wrapped, form, seed=0)
    for _, pair, _ in pairs(wrapped):
        pair.lora_B.data += 0.1 * torch.randn(pair.lora_B.shape)
    tensors = {n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad}
    plain, converted = lora_files.beside_the_base(base, form, tensors)
    assert plain == dataclasses.replace(LoRA(8, 6.0 * 2**0.5, True))
    beside = copy.deepcopy(base)
    add_lora(beside, plain, seed=5)
    lora_files.load_adapter(beside, converted, "the conversion")
    want = wrapped.logits(range(20))
    gap = float((beside.logits(range(20)) - want).abs().max())
    moved = float((base.logits(range(20)) - want).abs().max())
    assert gap < 1e-4 < 1e-2 < moved, f"off by {gap:.1e}; training moved logits by {moved:.1e}"


# --- targets ---

LAYER = "model.layers.1."
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = {
    "attention": (["q_proj", "o_proj"], ["self_attn.q_proj", "self_attn.o_proj"]),
    "experts": (["experts"], EXPERTS),
    "one stack": (["experts.down_proj"], EXPERTS[1:]),
    "a regular expression": ([r".*\.1\..*shared_experts\.(gate|up)_proj"],
                             ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"]),
    "published names": ([r".*experts\.\d+\.(gate|up|down)_proj"], EXPERTS),
    "everywhere": (["down_proj"], ["mlp.shared_experts.down_proj", EXPERTS[1]]),
    "gate and up": (["gate_proj", "up_proj"],
                    ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", EXPERTS[0]]),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets_mean_weights_and_only_they_are_trained(case: str) -> None:
    targets, expected = TARGETS[case]
    model = ErnieModel(TINY["tiny-moe"], dtype=torch.float32)
    model.init_weights(seed=2)
    add_lora(model, LoRA(2, 4.0, targets=tuple(targets)), seed=0)
    found = {name for name, _, _ in pairs(model) if name.startswith(LAYER)}
    assert found == {LAYER + name for name in expected}
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _, _ in pairs(model)}
    model.logits(range(5))


def test_no_target_and_all_linear_are_every_projection() -> None:
    names = weight_names(ErnieModel(TINY["tiny-moe"], device="meta"))
    assert chosen(names, ()) == chosen(names, ("all-linear",)) == chosen(names, (*ALL,))
    assert chosen(names, ()) == set(names)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qkv_proj"], "lora_target_modules=qkv_proj matches no projection.*use all-linear, down"),
        (["q_proj", "embed_tokens"], "embed_tokens matches no projection"),
        (["experts.3.down_proj"], "matches no projection"),
        ([r"(q_proj"], "is not a regular expression"),
        (["gate_proj"], "means gate_proj of .*experts.gate_up_proj without its up_proj"),
    ],
)
def test_targets_that_mean_nothing_are_refused(targets: list[str], message: str) -> None:
    names = weight_names(ErnieModel(TINY["tiny-moe"], device="meta"))
    with pytest.raises(ConfigError, match=message):
        chosen(names, targets)


# --- PEFT's own form of routed experts ---


@pytest.mark.parametrize("which", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
def test_experts_of_peft_are_read_and_written(which: list[str], tmp_path: Path) -> None:
    theirs = hf_moe()
    base = ernie.load(saved(theirs, tmp_path / "base"), dtype=torch.float32)
    plain = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"], init_lora_weights=False,
        target_parameters=[f"mlp.experts.{leaf}" for leaf in which],
    )  # fmt: skip
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    ids = [(5 * i) % 199 for i in range(20)]
    with torch.no_grad():
        wanted = wrapped(torch.tensor([ids])).logits[0]
    form, tensors = lora_files.read_adapter(tmp_path / "theirs", base.config, "base")
    add_lora(base, form, seed=0)
    lora_files.load_adapter(base, tensors, "the file")
    gap, moved = (float((m.logits(ids) - wanted).abs().max()) for m in (base, plain))
    assert gap < 2e-4 < 1e-2 < moved, f"off by {gap:.1e}; the adapter moves logits by {moved:.1e}"

    text, files = lora_files.peft_form(plain, form, tensors, "a base", "here")
    folder = tmp_path / "ours"
    folder.mkdir()
    write_file(folder / lora_files.ADAPTER_FILE, files)
    (folder / lora_files.ADAPTER_CONFIG).write_text(text)
    back = peft.PeftModel.from_pretrained(hf_moe(), folder)
    with torch.no_grad():
        gap = float((back(torch.tensor([ids])).logits[0] - wanted).abs().max())
    assert gap < 2e-4, f"what PEFT reads back is off by {gap:.1e}"


@pytest.mark.parametrize(
    ("targets", "parameters"),
    [
        (ALL, [f"{b}_moe.experts.{x}" for b in ("text", "vision") for x in STACKED]),
        (["q_proj"], ["vision_moe.experts.down_proj"]),
        (["shared_experts.up_proj"], [f"mlp.vision_moe.experts.{x}" for x in STACKED]),
        (r"model\.language_model\..*\.[02]\.self_attn\.v_proj", ["experts.gate_up_proj"]),
    ],
    ids=["everything", "vision down", "vision and shared", "both banks by one name"],
)
def test_pairs_of_multimodal_models_are_read_and_written(
    targets: list[str] | str, parameters: list[str], tmp_path: Path
) -> None:
    theirs, case = hf_vl(), PROMPTS["several images"]
    base = ernie.load(saved(theirs, tmp_path / "base"), dtype=torch.float32)
    plain = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, target_parameters=parameters,
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = wrapped(**case.inputs).logits[0]
    form, tensors = lora_files.read_adapter(tmp_path / "theirs", base.config, "base")
    add_lora(base, form, seed=0)
    lora_files.load_adapter(base, tensors, "the file")
    found = (m.logits(case.ids, **case.pictures) for m in (base, plain))
    gap, moved = (float((logits - wanted).abs().max()) for logits in found)
    assert gap < 2e-4 < 1e-2 < moved, f"off by {gap:.1e}; the adapter moves logits by {moved:.1e}"

    text, files = lora_files.peft_form(plain, form, tensors, "a base", "here")
    stored = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert files.keys() == stored.keys()
    assert all(torch.equal(files[name], stored[name]) for name in files)
    folder = tmp_path / "ours"
    folder.mkdir()
    write_file(folder / lora_files.ADAPTER_FILE, files)
    (folder / lora_files.ADAPTER_CONFIG).write_text(text)
    back = peft.PeftModel.from_pretrained(hf_vl(), folder)
    with torch.no_grad():
        gap = float((back(**case.inputs).logits[0] - wanted).abs().max())
    assert gap < 2e-4, f"what PEFT reads back is off by {gap:.1e}"


def test_pairs_of_some_layers_of_a_bank_are_refused_for_peft(tmp_path: Path) -> None:
    base = ErnieModel(TINY["tiny-vl"])
    names = [n for n in weight_names(base) if ".vision_experts." in n]
    tensors = {f"{name}.lora_{part}": torch.zeros(1) for name in names[2:] for part in "AB"}
    with pytest.raises(ConfigError, match="experts of some layers only"):
        lora_files.peft_form(base, LoRA(2, 2.0), tensors, "a base", "here")
