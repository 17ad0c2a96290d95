"""Loading and saving against transformers, in all layouts, to the bit where bits must stay."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ernie
from ernie.checkpoint import convert
from ernie.checkpoint.folder import CheckpointError, Stored, read_folder
from ernie.checkpoint.layouts import LAYOUTS, PADDLE, PT_VL, layouts_of
from ernie.checkpoint.writer import write_file
from ernie.model import ErnieModel
from ernie.models import MODELS, TINY
from ernie.tokenizer import Tokenizer
from tests.helpers import hf_dense, hf_logits, hf_moe, hf_vl, saved, some_ids

GOLDEN = Path(__file__).parents[1] / "golden"

MODELS_OF_TRANSFORMERS = {
    "dense": lambda: hf_dense(1),
    "dense, wide heads": lambda: hf_dense(2, head_dim=32, num_key_value_heads=3),
    "dense, biased, untied": lambda: hf_dense(3, use_bias=True, tie_word_embeddings=False),
    "dense, one head": lambda: hf_dense(4, num_attention_heads=1, num_key_value_heads=1),
    "moe": lambda: hf_moe(5),
    "moe, untied": lambda: hf_moe(6, tie_word_embeddings=False, head_dim=16),
    "moe, no shared experts": lambda: hf_moe(7, moe_num_shared_experts=0),
    "moe, one shared expert, k = 1": lambda: hf_moe(8, moe_num_shared_experts=1, moe_k=1),
    "moe, every second layer": lambda: hf_moe(
        9, num_hidden_layers=5, moe_layer_interval=2, moe_layer_start_index=0
    ),
    "moe, layers 1 to 2": lambda: hf_moe(10, moe_layer_end_index=2),
}


@pytest.fixture(params=MODELS_OF_TRANSFORMERS, scope="module")
def reference(request):
    return MODELS_OF_TRANSFORMERS[request.param]()


def gap(ours: ErnieModel, reference) -> float:
    ids = some_ids(23, ours.config.vocab_size)
    expected = hf_logits(reference, ids)
    assert expected.std() > 0.1
    return float((ours.logits(ids) - expected).abs().max())


def random_model(kind: str, seed: int, dtype=torch.float32, **changes) -> ErnieModel:
    model = ErnieModel(replace(TINY[kind], **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def bytes_by_name(folder: Path) -> dict[str, tuple]:
    """Every tensor of a folder, read by the safetensors library."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_logits_of_a_folder_of_transformers(reference, tmp_path):
    model = ernie.load(saved(reference, tmp_path), dtype=torch.float32)
    assert gap(model, reference) < 1e-4


def test_transformers_reads_what_we_save_as_pt(reference, tmp_path):
    model = ernie.load(saved(reference, tmp_path / "theirs"), dtype=torch.float32)
    ernie.save(model, tmp_path / "ours", layout="pt")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = some_ids(23, model.config.vocab_size)
    assert (hf_logits(again, ids) - hf_logits(reference, ids)).abs().max() == 0


def test_transformers_to_us_and_back_is_the_identity(reference, tmp_path):
    folder = saved(reference, tmp_path / "theirs")
    ernie.save(ernie.load(folder, dtype=torch.float32), tmp_path / "ours", layout="pt")
    assert bytes_by_name(tmp_path / "ours") == bytes_by_name(folder)


def test_stacked_experts_of_transformers(tmp_path):
    reference = hf_moe(11)
    folder = saved(reference, tmp_path / "theirs", save_original_format=False)
    model = ernie.load(folder, dtype=torch.float32)
    assert any(name.endswith("experts.gate_up_proj") for name in read_folder(folder))
    assert gap(model, reference) < 1e-4
    ernie.save(model, tmp_path / "ours", layout="transformers")
    assert bytes_by_name(tmp_path / "ours") == bytes_by_name(folder)


def test_sharded_folder_of_transformers(tmp_path):
    reference = hf_moe(12)
    folder = saved(reference, tmp_path, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert gap(ernie.load(folder, dtype=torch.float32), reference) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 40_000])
def test_save_and_load_change_no_bit(layout, kind, max_shard_bytes, tmp_path):
    model = random_model(kind, 13, torch.bfloat16)
    ernie.save(model, tmp_path / "a", layout, max_shard_bytes=max_shard_bytes)
    again = ernie.load(tmp_path / "a")
    assert again.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other and p.dtype == q.dtype and p.requires_grad == q.requires_grad
        assert torch.equal(p, q), name
    ernie.save(again, tmp_path / "b", layout, max_shard_bytes=max_shard_bytes)
    assert bytes_by_name(tmp_path / "b") == bytes_by_name(tmp_path / "a")
    sizes = [f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors")]
    assert len(sizes) == 1 or max(sizes) < max_shard_bytes + 10_000


def paddle_by_hand(model: ErnieModel) -> dict[str, torch.Tensor]:
    """A -Paddle checkpoint of a model, written without the tables."""
    state = {k: v.detach() for k, v in model.state_dict().items()}
    stored = {}
    for name, value in state.items():
        short = name.removeprefix("model.")
        for old, new in (
            ("emb_norm", "mtp_emb_norm.0"),
            ("hidden_norm", "mtp_hidden_norm.0"),
            ("linear_proj", "mtp_linear_proj.0"),
            ("block", "mtp_block.0"),
        ):
            short = short.replace(f"mtp.0.{old}", new)
        home, _, leaf = short.rpartition(".")
        home = "ernie." + home if name.startswith("model.") else home
        home, first = home.replace(".vision_experts", ".experts"), 0
        if ".vision_experts" in name:  # numbered on behind the text experts
            first = len(state[name.replace(".vision_experts", ".experts")])
        if ".vision_gate" in home:
            stored[home.replace(".vision_gate", ".gate") + ".weight_1"] = value.T
        elif ".q_proj" in home:
            qkv = [state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            joined = torch.cat([t.T for t in qkv], -1) if leaf == "weight" else torch.cat(qkv)
            stored[home.replace("q_proj", "qkv_proj") + "." + leaf] = joined
        elif home.endswith((".k_proj", ".v_proj", ".up_proj")):
            continue
        elif home.endswith("gate_proj"):
            parts = [value, state[name.replace("gate_proj", "up_proj")]]
            joined = torch.cat([t.T for t in parts], -1) if leaf == "weight" else torch.cat(parts)
            stored[home.replace("gate_proj", "up_gate_proj") + "." + leaf] = joined
        elif leaf == "gate_up_proj":
            for e, expert in enumerate(value):
                stored[f"{home}.{first + e}.up_gate_proj.weight"] = expert.T
        elif leaf == "down_proj":
            for e, expert in enumerate(value):
                stored[f"{home}.{first + e}.down_proj.weight"] = expert.T
        else:
            keep = value.dim() == 1 or "embed_tokens" in name or "e_score" in name
            stored[f"{home}.{leaf}"] = value if keep else value.T
    return {name: tensor.contiguous() for name, tensor in stored.items()}


@pytest.mark.parametrize("root", PADDLE.roots)
@pytest.mark.parametrize("kind", TINY)
def test_paddle_layout_against_one_written_by_hand(kind, root, tmp_path):
    model = random_model(
        kind, 14, torch.bfloat16, **({"use_bias": True} if "dense" in kind else {})
    )
    stored = {
        name.replace("ernie.", root + ".", 1): tensor
        for name, tensor in paddle_by_hand(model).items()
    }
    (tmp_path / "theirs").mkdir()
    save_file(stored, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(model.config.to_dict()))
    again = ernie.load(tmp_path / "theirs")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    ernie.save(again, tmp_path / "ours", "paddle")
    read = bytes_by_name(tmp_path / "theirs")
    theirs = {re.sub(rf"^{root}\.", "ernie.", name): value for name, value in read.items()}
    assert bytes_by_name(tmp_path / "ours") == theirs
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written


def test_tensors_of_any_stride_are_written(tmp_path):
    tensors = {
        "one": torch.zeros((), dtype=torch.float64).expand(1),
        "spread": torch.tensor([3.0, 4.0]).expand(3, 2),
        "turned": torch.arange(6).view(2, 3).T,
        "part": torch.arange(9.0)[4:6],
        "none": torch.zeros(0, 3),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_bits_of_bfloat16_in_unsigned_integers(tmp_path):
    model = random_model("tiny-dense", 15, torch.bfloat16)
    stored = {k: v.view(torch.uint16) for k, v in paddle_by_hand(model).items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    again = ernie.load(tmp_path)
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())


def test_mtp_projection_the_wrong_way_round(tmp_path):
    model = random_model("tiny-moe", 16)
    ernie.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.mtp_linear_proj.0.weight"
    assert stored[name].shape == (40, 80)
    stored[name] = stored[name].T.contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    again = ernie.load(tmp_path, dtype=torch.float32)
    weight = "model.mtp.0.linear_proj.weight"
    assert torch.equal(again.get_parameter(weight), model.get_parameter(weight))


def test_folder_without_mtp_loads_without_it(tmp_path, caplog):
    reference = hf_moe(17)
    folder = saved(reference, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    with caplog.at_level(logging.WARNING):
        model = ernie.load(folder, dtype=torch.float32)
    assert model.config.num_nextn_predict_layers == 0
    assert "without multi-token prediction" in caplog.text
    assert gap(model, reference) < 1e-4


def test_mtp_that_the_config_does_not_mention_is_left_out_and_said(tmp_path, caplog):
    model = random_model("tiny-moe", 18)
    ernie.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        again = ernie.load(tmp_path, dtype=torch.float32)
    assert not list(again.model.mtp) and "12 tensors" in caplog.text
    assert torch.equal(again.logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_dtype_is_converted_but_for_the_router(tmp_path):
    model = random_model("tiny-moe", 19)
    ernie.save(model, tmp_path)
    half = ernie.load(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        router = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16), name
        assert torch.equal(parameter, model.get_parameter(name).to(parameter.dtype)), name
    assert ernie.load(tmp_path, dtype=None).model.norm.weight.dtype == torch.float32


def test_large_tensors_are_read_in_slices(tmp_path):
    values = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)
    save_file({"x": values}, tmp_path / "model.safetensors")
    stored = read_folder(tmp_path)["x"]
    chunks = [(first, rows.clone()) for first, rows in stored.rows(chunk_bytes=2 * 5 * 4)]
    assert [first for first, _ in chunks] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([rows for _, rows in chunks]), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_does_not_depend_on_the_slice_size(layout, tmp_path, monkeypatch):
    model = random_model("tiny-moe", 20)
    ernie.save(model, tmp_path, layout)
    whole = Stored.rows
    monkeypatch.setattr(Stored, "rows", lambda self: whole(self, chunk_bytes=500))
    again = ernie.load(tmp_path, dtype=torch.float32)
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())


def test_generation_config_and_unknown_keys_are_kept_but_not_code(tmp_path, caplog):
    folder = saved(hf_dense(21), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model"}, "fuse_rope": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"top_p": 0.8, "eos_token_id": 2}')
    with caplog.at_level(logging.INFO):
        model = ernie.load(folder)
    assert "never run" in caplog.text
    ernie.save(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["fuse_rope"] is True and "auto_map" not in written
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert generation == {"top_p": 0.8, "eos_token_id": 2}


def test_saving_over_another_checkpoint_leaves_nothing_of_it(tmp_path):
    ernie.save(random_model("tiny-moe", 22), tmp_path, max_shard_bytes=20_000)
    small = random_model("tiny-dense", 23)
    ernie.save(small, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(ernie.load(tmp_path, torch.float32).logits([1, 2]), small.logits([1, 2]))


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_the_size_of_a_head_is_taken_from_the_weights_where_nothing_says_it(layout, tmp_path):
    model = random_model("tiny-dense", 23, head_dim=24)
    ernie.save(model, tmp_path, layout=layout)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    assert raw.pop("head_dim") != raw["hidden_size"] // raw["num_attention_heads"]
    path.write_text(json.dumps(raw))
    again = ernie.load(tmp_path, torch.float32)
    assert again.config.head_dim == 24
    assert torch.equal(again.logits([1, 2]), model.logits([1, 2]))


@pytest.mark.parametrize("value", [None, {}])
def test_a_folder_that_says_it_is_not_quantised_is_not(value, tmp_path):
    ernie.save(random_model("tiny-dense", 23), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
    assert "quantization_config" not in ernie.load(tmp_path).config.extra


def test_saving_again_beside_named_templates_replaces_all_that_travels(folders, tmp_path):
    """`a` has a folder of templates, and files of another kind of tokenizer lie there before."""
    source = Path(shutil.copytree(folders("sentencepiece"), tmp_path / "source"))
    more = source / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("first")
    model, target = random_model("tiny-dense", 27, vocab_size=600), tmp_path / "a"
    for text in ("first", "second"):
        (more / "tool_use.jinja").write_text(text)
        model.tokenizer = Tokenizer.from_folder(source)
        ernie.save(model, target)
        assert (target / "additional_chat_templates/tool_use.jinja").read_text() == text
        assert len(ernie.load(target).tokenizer.files) == len(model.tokenizer.files)
        for name in ("tokenizer.json", "generation_config.json"):
            assert not (target / name).exists() or name in {f.name for f in source.iterdir()}
            (target / name).write_text("{}")  # of another model


def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    old = random_model("tiny-dense", 24)
    ernie.save(old, tmp_path)
    before = bytes_by_name(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ernie.checkpoint.writer._sync", full)
    with pytest.raises(OSError, match="No space left"):
        ernie.save(random_model("tiny-dense", 25), tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert bytes_by_name(tmp_path) == before


def test_parameter_that_the_layout_does_not_know_is_not_lost(tmp_path):
    model = random_model("tiny-dense", 26)
    model.model.layers[0].self_attn.q_proj.lora_a = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_a"):
        ernie.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layout_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="'onnx' is not known; use one of pt"):
        ernie.save(random_model("tiny-dense", 27), tmp_path, "onnx")


# Peak memory of the process over what it held before, measured in a process of its own.
MEASURE = """
import re, sys, torch
import ernie, ernie.checkpoint.io, ernie.model, ernie.tokenizer
torch.ones(64, 64, dtype=torch.bfloat16).aminmax()
def peak():
    # Not ru_maxrss: a process started by another one inherits that one's peak.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = ernie.load(sys.argv[1])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_loading_needs_little_more_memory_than_the_weights(layout, tmp_path):
    config = replace(
        TINY["tiny-moe"],
        hidden_size=512,
        moe_intermediate_size=512,
        moe_num_experts=32,
        num_hidden_layers=9,
        vocab_size=40_000,
    )
    model = ErnieModel(config)
    model.init_weights(seed=0)
    ernie.save(model, tmp_path, layout)
    del model
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, weights = map(int, out.stdout.split())
    assert weights > 400 * 2**20
    assert peak < 1.2 * weights, f"{peak / weights:.2f} times the weights of {weights >> 20} MiB"


def test_parameter_counts_are_the_published_ones():
    golden = json.loads((GOLDEN / "param_counts.json").read_text())
    counted = {
        name: {
            "total": model.config.num_params(),
            "with_mtp": model.config.num_params(mtp=True),
            "active": model.config.num_params(active=True),
        }
        for name, model in MODELS.items()
    }
    assert counted == golden


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_names_of_the_released_models(layout):
    """Names with their numbers replaced by *, and how many there are of each."""
    golden = json.loads((GOLDEN / "checkpoint_keys.json").read_text())[layout]
    assert golden.keys() >= {"ERNIE-4.5-21B-A3B", "ERNIE-4.5-VL-28B-A3B"}
    for name, expected in golden.items():
        config = MODELS[name].config
        template = dict(ErnieModel(config, device="meta").named_parameters())
        assert key_summary(template, layouts_of(template)[layout]) == expected, name
        assert sum(t.numel() for t in template.values()) == config.num_params(mtp=True)


def key_summary(template, layout) -> dict[str, list]:
    units = convert.plan(template, layout)
    summary: dict[str, list] = {"total": [0]}
    for tensor in convert.planned(units, template):
        name = re.sub(r"\.\d+\.", ".*.", tensor.name)
        if "_linear." in tensor.name and ".mtp" not in tensor.name:  # layers, not repetitions
            name = tensor.name
        if ".experts." in tensor.name and name in summary and summary[name][1:] != [*tensor.shape]:
            name += " (vision)"
        row = summary.setdefault(name, [0, *tensor.shape])
        row[0] += 1
        summary["total"][0] += 1
    return summary


def test_tensor_counts_of_the_published_folders():
    counts = {
        "ERNIE-4.5-0.3B": 164,
        "ERNIE-4.5-21B-A3B": 5504,
        "ERNIE-4.5-300B-A47B": 10242,
        "ERNIE-4.5-VL-28B-A3B": 11105,
        "ERNIE-4.5-VL-424B-A47B": 20475,
    }
    for name, expected in counts.items():
        template = dict(ErnieModel(MODELS[name].config, device="meta").named_parameters())
        assert len(convert.names_of(convert.plan(template, layouts_of(template)["pt"]))) == expected


@pytest.mark.parametrize("tower", PT_VL.towers)
def test_vision_tower_under_both_prefixes(tower, tmp_path):
    """As published, and as transformers 5 writes it; what we write is the published form."""
    theirs = saved(hf_vl(28), tmp_path / "theirs")
    stored = load_file(theirs / "model.safetensors")
    assert "model.vision_model.blocks.1.attn.qkv.weight" in stored
    renamed = {k.replace("model.vision_model", tower, 1): v for k, v in stored.items()}
    save_file(renamed, theirs / "model.safetensors")
    ernie.save(ernie.load(theirs, dtype=torch.float32), tmp_path / "ours", "pt")
    ours = bytes_by_name(tmp_path / "ours")
    published = {k.replace(tower, "vision_model", 1): v for k, v in bytes_by_name(theirs).items()}
    assert ours == published
    assert "vision_model.blocks.1.attn.qkv.weight" in ours


def test_conversions_between_all_layouts_change_no_bit(tmp_path):
    model = random_model("tiny-vl", 29, torch.bfloat16)
    last = tmp_path / "0"
    ernie.save(model, last)
    for number, layout in enumerate(["paddle", "transformers", "pt", "transformers", "paddle"], 1):
        ernie.save(ernie.load(last), tmp_path / str(number), layout)
        last = tmp_path / str(number)
    again = ernie.load(last)
    assert again.config == model.config and again.layout == "paddle"
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
