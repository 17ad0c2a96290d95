"""Exports: every form against the program it is for, and round trips without a changed bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ernie
from erniekit import lora, reward_model
from erniekit.cli import main
from erniekit.lora import LoRA
from erniekit.lora_files import put_in
from tests import helpers_lora

PAIR = LoRA(rank=3, alpha=6, is_rank_stabilised=True)


@pytest.fixture
def trained(tiny, tmp_path: Path):
    """A function that leaves in a folder what training leaves: a whole model or an adapter."""

    def make(name: str, kind: str) -> tuple[Path, list[str]]:
        out = tmp_path / "out"
        base = ernie.load(tiny(name), dtype=torch.float32)
        if kind == "LoRA":
            helpers_lora.save(helpers_lora.trained(base, PAIR, seed=1), PAIR, out)
        else:
            ernie.save(base, out)
        return out, [f"output_dir={out}", f"model_name_or_path={tiny(name)}"]

    return make


def expected_logits(tiny, name: str, out: Path, kind: str) -> torch.Tensor:
    model = ernie.load(tiny(name), dtype=torch.float32)
    if kind == "LoRA":
        put_in(model, out, tiny(name))
    return model.logits(range(30))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(torch.arange(30)[None]).logits[0].float()


@pytest.mark.parametrize("layout", ["pt", "transformers"])
@pytest.mark.parametrize("kind", ["Full", "LoRA"])
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_transformers_computes_the_same(name, kind, layout, trained, tiny) -> None:
    out, words = trained(name, kind)
    assert main(["export", f"export_format={layout}", *words]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out / "export", dtype=torch.float32)
    worst = (logits_of(theirs) - expected_logits(tiny, name, out, kind)).abs().max().item()
    assert worst < 2e-4, f"logits are off by {worst:.1e}"


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_layouts_turn_into_each_other_without_a_changed_bit(name, trained, tiny) -> None:
    out, words = trained(name, "Full")
    for layout in ("paddle", "transformers", "pt"):
        assert main(["export", f"export_format={layout}", *words]) == 0
        turned = ernie.load(out / "export", dtype=None)
        # A dense model has the same names in the two layouts of matrices [out, in].
        assert turned.layout == ("pt" if name == "tiny-dense" and layout != "paddle" else layout)
        originals = ernie.load(tiny(name), dtype=None).named_parameters()
        for (key, a), b in zip(originals, turned.parameters(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"{key} in {layout}"


def test_transformers_has_the_names_of_its_layout(trained) -> None:
    out, words = trained("tiny-moe", "Full")
    assert main(["export", "export_format=transformers", *words]) == 0
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in load_file(out / "export/model.safetensors").items()
        if ".mtp_" not in name  # which transformers leaves out
    }
    theirs = AutoModelForCausalLM.from_pretrained(out / "export").state_dict()
    shapes = {name: tuple(t.shape) for name, t in theirs.items()}
    tied = {"lm_head.weight"} if "lm_head.weight" not in ours else set()
    assert ours.keys() == shapes.keys() - tied
    assert all(ours[name] == shapes[name] for name in ours)


def dense_base(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("tiny-dense"), dtype=torch.float32)


def test_peft_loads_the_adapter_and_computes_the_same(trained, tiny) -> None:
    out, words = trained("tiny-dense", "LoRA")
    assert main(["export", "export_format=peft", *words]) == 0
    config = json.loads((out / "export/peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny("tiny-dense"))
    theirs = logits_of(peft.PeftModel.from_pretrained(dense_base(tiny), out / "export/peft"))
    expected = expected_logits(tiny, "tiny-dense", out, "LoRA")
    worst = (theirs - expected).abs().max().item()
    plain = (logits_of(dense_base(tiny)) - expected).abs().max().item()
    assert worst < 2e-4 < plain, f"logits are off by {worst:.1e}; without the adapter {plain:.1e}"


def test_an_adapter_of_peft_is_read_here(tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(dense_base(tiny), config)
    theirs.save_pretrained(tmp_path)
    model = ernie.load(tiny("tiny-dense"), dtype=torch.float32)
    put_in(model, tmp_path, tiny("tiny-dense"))
    worst = (model.logits(range(30)) - logits_of(theirs)).abs().max().item()
    assert worst < 2e-4, f"logits are off by {worst:.1e}"


@pytest.mark.parametrize("kind", ["Full", "LoRA"])
def test_gguf_holds_the_merged_weights(kind, trained, tiny) -> None:
    out, words = trained("tiny-dense", kind)
    assert main(["export", "export_format=gguf", "gguf_dtype=f32", *words]) == 0
    assert [p.name for p in (out / "export").iterdir()] == ["model-f32.gguf"]
    assert not list(out.glob(".merged-*")), "the merged folder stayed"
    tensors = {t.name: t for t in gguf.GGUFReader(out / "export/model-f32.gguf").tensors}
    model = ernie.load(tiny("tiny-dense"), dtype=torch.float32)
    if kind == "LoRA":
        put_in(model, out, tiny("tiny-dense"))
        lora.merge_lora(model)
    ours = model.model.layers[1].mlp.down_proj.weight.detach()
    found = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy()).view_as(ours)
    assert torch.equal(found, ours)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_split_model_is_the_whole_one(name, trained, tiny) -> None:
    out, words = trained(name, "Full")
    assert main(["split", "max_shard_size=0.0001", *words]) == 0
    folder = out / "split_export"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        with safe_open(file, "pt") as opened:
            count = len(opened.keys())
        assert count == 1 or file.stat().st_size < 110_000, file.name
    whole, parts = ernie.load(out, dtype=None), ernie.load(folder, dtype=None)
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), key
    assert parts.tokenizer is not None


@pytest.mark.parametrize(
    ("verb", "name", "kind", "more", "message"),
    [
        ("export", "tiny-dense", "Full", [], "needs no export"),
        ("export", "tiny-dense", "Full", ["export_format=peft"], "there is no adapter"),
        ("export", "tiny-moe", "LoRA", ["export_format=peft"], "which PEFT takes for pairs of"),
        ("export", "tiny-dense", "LoRA", ["export_format=onnx"], "use one of"),
        ("export", "tiny-dense", "LoRA", ["max_shard_size=0"], "give more than 0"),
        ("split", "tiny-dense", "LoRA", [], "which is one file"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    verb, name, kind, more, message, trained, capsys
) -> None:
    _, words = trained(name, kind)
    assert main([verb, *more, *words]) == 2
    assert message in capsys.readouterr().err


def test_another_export_leaves_no_small_file_behind(trained, tiny, tmp_path: Path) -> None:
    out, words = trained("tiny-dense", "LoRA")
    base = Path(shutil.copytree(tiny("tiny-dense"), tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main(["export", words[0], f"model_name_or_path={base}"]) == 0
    assert (out / "export/chat_template.jinja").is_file()
    assert main(["export", *words]) == 0
    assert not (out / "export/chat_template.jinja").exists()
    assert (out / "export/tokenizer.model").is_file()
    assert main(["export", *words, "copy_tokenizer=false"]) == 0
    assert not list((out / "export").glob("*token*"))
    assert ernie.load(out / "export").tokenizer is None


def test_the_base_of_an_adapter_is_found_or_told(trained, tiny, tmp_path: Path, capsys) -> None:
    out, words = trained("tiny-dense", "LoRA")
    assert main(["export", words[0]]) == 2
    assert "model_name_or_path is not set; the adapter in" in capsys.readouterr().err
    assert main(["export", *words]) == 0
    told = f"was trained beside a base and is put on {tiny('tiny-dense')}"
    assert told in capsys.readouterr().out, "the adapter says `a base`"

    values = json.loads((out / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(tiny("tiny-dense"))
    (out / "adapter_config.json").write_text(json.dumps(values))
    for given in (words, words[:1]):
        shutil.rmtree(out / "export")
        assert main(["export", *given]) == 0
        assert "was trained beside" not in capsys.readouterr().out
        assert (out / "export/config.json").is_file()


@pytest.mark.parametrize(("form", "kind"), [("gguf", "Full"), ("gguf", "LoRA"), ("peft", "LoRA")])
def test_forms_without_a_place_for_a_reward_head_refuse_it(form, kind, trained, capsys) -> None:
    out, words = trained("tiny-dense", kind)
    reward_model.write_head(out, torch.ones(1, 64))
    assert main(["export", f"export_format={form}", *words]) == 2
    assert f"is a reward model, and {form} has no place for its head" in capsys.readouterr().err
    assert not (out / "export").exists()
