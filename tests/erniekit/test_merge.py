"""Merging: every method against its formula on whole models, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ernie
from erniekit.cli import main
from erniekit.merge import Merge, mix_of
from tests.helpers_tokenizer import byte_level_folder


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders of a base MoE model and of two that differ from it, in three layouts."""
    root = tmp_path_factory.mktemp("merge")
    base = ernie.load(tiny("tiny-moe"), dtype=None)
    folders = {"base": root / "base", "one": root / "one", "two": root / "two"}
    ernie.save(base, folders["base"], layout="paddle")
    for seed, (name, layout) in enumerate((("one", "pt"), ("two", "transformers"))):
        other = ernie.load(folders["base"], dtype=None)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        ernie.save(other, folders[name], layout=layout)
    return folders


def split(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder with experts and projections apart, as in the published files."""
    found = {}
    for name, tensor in ernie.load(folder, dtype=None).named_parameters():
        if tensor.ndim == 3:
            halves = 2 if name.endswith("gate_up_proj") else 1
            for e, expert in enumerate(tensor.detach()):
                for h, part in enumerate(expert.chunk(halves)):
                    found[f"{name}.{e}.{h}"] = part
        else:
            found[name] = tensor.detach()
    return found


def trimmed(delta: Tensor, density: float) -> Tensor:
    count = max(1, int(density * delta.numel()))
    kept = delta.abs().flatten().sort(descending=True).indices[:count]
    mask = torch.zeros(delta.numel())
    mask[kept] = 1
    return delta * mask.view_as(delta)


def linear(one: Tensor, two: Tensor, base: Tensor) -> Tensor:
    return (0.25 * one + 0.5 * two) / 0.75


def on_the_arc(one: Tensor, two: Tensor, base: Tensor) -> Tensor:
    a, b = one.flatten().double(), two.flatten().double()
    if not (a.norm() and b.norm()):
        return 0.7 * one + 0.3 * two
    cosine = float(a @ b / (a.norm() * b.norm()))
    if abs(cosine) > 0.9995:
        return 0.7 * one + 0.3 * two
    angle = math.acos(cosine)
    mixed = math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b
    return (mixed / math.sin(angle)).view_as(one).float()


def with_elected_signs(one: Tensor, two: Tensor, base: Tensor) -> Tensor:
    deltas = [trimmed(one - base, 0.3), trimmed(two - base, 0.3)]
    weights = (0.25, 0.5)
    votes = weights[0] * deltas[0] + weights[1] * deltas[1]
    top, bottom = torch.zeros_like(base), torch.zeros_like(base)
    for weight, delta in zip(weights, deltas):
        agrees = (delta > 0) & (votes >= 0) | (delta < 0) & (votes < 0)
        top += weight * delta * agrees
        bottom += weight * agrees
    return base + 0.8 * torch.where(bottom > 0, top / bottom.clamp(min=1e-30), 0)


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        (["method=linear", "weights=0.25,0.5"], linear),
        (["method=slerp", "t=0.3"], on_the_arc),
        (["method=ties", "weights=0.25,0.5", "density=0.3", "scale=0.8"], with_elected_signs),
    ],
    ids=["linear", "slerp", "ties"],
)
def test_mixes_equal_their_formula(words, formula, models, tmp_path: Path) -> None:
    if formula is with_elected_signs:
        words = [*words, f"base={models['base']}"]
    target = tmp_path / "mix"
    assert main(["merge", str(models["one"]), str(models["two"]), str(target), *words]) == 0
    mixed, one, two, base = map(split, (target, models["one"], models["two"], models["base"]))
    assert mixed.keys() == one.keys()
    for name, tensor in mixed.items():
        expected = formula(one[name], two[name], base[name])
        worst = (tensor - expected).abs().max().item()
        assert worst < 2e-6, f"{name} is off by {worst:.1e}"
    assert ernie.load(target).tokenizer is not None


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_drops_and_rescales(method: str) -> None:
    base = torch.zeros(400, 500)
    options = Merge(method=method, weights=(1.0,), normalize=False, density=0.25, seed=3)
    mixed = mix_of([base + 2.0, base], options, "x")
    assert set(mixed.unique().tolist()) == {0.0, 8.0}
    share = (mixed != 0).float().mean().item()
    assert abs(share - 0.25) < 0.005, f"{share:.4f} of the entries were kept"
    again = mix_of([base + 2.0, base], options, "x")
    assert torch.equal(mixed, again)
    for other in (dataclasses.replace(options, seed=4), options):
        name = "x" if other is not options else "y"
        assert not torch.equal(mixed, mix_of([base + 2.0, base], other, name))


def test_dare_ties_leaves_out_the_minority_and_dare_does_not() -> None:
    base, up, down = torch.ones(8), torch.full((8,), 4.0), torch.full((8,), 0.0)
    for method, expected in (("dare", 1 + 0.5 * 3 - 0.5), ("dare_ties", 1 + 0.5 * 3)):
        options = Merge(method=method, weights=(0.5, 0.5), normalize=False, density=1.0)
        assert mix_of([up, down, base], options, "x").tolist() == [expected] * 8


def test_layout_and_dtype_are_chosen_and_files_are_kept(models, tmp_path: Path) -> None:
    target = tmp_path / "mix"
    words = ["layout=paddle", "dtype=bfloat16"]
    assert main(["merge", str(models["one"]), str(models["one"]), str(target), *words]) == 0
    mixed = ernie.load(target, dtype=None)
    assert mixed.layout == "paddle"
    for (name, a), b in zip(
        mixed.named_parameters(), ernie.load(models["one"]).parameters(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{one}", "{target}"], "2 paths were given"),
        (["{one}", "{two}", "{target}", "t=0.5"], "linear does not read t; slerp does"),
        (["{one}", "{two}", "{target}", "weights=1"], "1 numbers for 2 sources"),
        (["{one}", "{two}", "{target}", "weights=1,-1"], "cannot be normalised"),
        (["{one}", "{two}", "{target}", "method=ties"], "needs base=FOLDER"),
        (["{one}", "{two}", "{base}", "{target}", "method=slerp"], "two models; 3 were given"),
        (["{one}", "{two}", "{target}", "method=ties", "base={base}", "density=0"], "density=0"),
        (
            ["{one}", "{two}", "{target}", "method=ties", "base={base}", "scale=inf"],
            "scale=inf is not finite; give a number",
        ),
        (
            ["{one}", "{two}", "{target}", "method=slerp", "t=nan"],
            "t=nan is not a number; give one",
        ),
        (["{one}", "{two}", "{file}"], "is a file; give a folder"),
        (["{one}", "{two}", "{one}"], "is read and cannot be the target too"),
        (["{one}", "{two}", "{base}"], "base holds a model; give another one, or overwrite=true"),
        (["{one}", "{other_words}", "{target}"], "have different tokenizers"),
        (["{one}", "{dense}", "{target}"], "only models of one shape"),
        (["{one}", "{two}/no", "{target}"], "there is no folder"),
        (["{one}", "{quantised}", "{target}"], "is quantised; give the model"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    words, message, models, tiny, tmp_path: Path, capsys
) -> None:
    places = {**models, "dense": tiny("tiny-dense"), "target": tmp_path / "mix"}
    places["file"] = tmp_path / "file"
    places["file"].write_text("x")
    if "{other_words}" in words:
        other = ernie.load(models["two"], dtype=None)
        other.tokenizer = ernie.Tokenizer.from_folder(byte_level_folder(tmp_path / "words"))
        places["other_words"] = tmp_path / "other_words"
        ernie.save(other, places["other_words"])
    if "{quantised}" in words:
        places["quantised"] = tmp_path / "quantised"
        assert main(["quantize", str(models["one"]), str(places["quantised"])]) == 0
    assert main(["merge", *(word.format(**places) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mix").exists()
