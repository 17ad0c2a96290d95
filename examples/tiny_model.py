"""Make a model folder with random weights and a tokenizer, small enough to try every command on.

    python examples/tiny_model.py FOLDER [tiny-dense|tiny-moe|tiny-vl]

The network is a small one of the family; the tokenizer is trained on the questions and answers of
examples/data. It writes nonsense until it is trained, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

import ernie
from ernie.config import ErnieConfig
from ernie.models import TINY

TEXTS = Path(__file__).parent / "data/sft-train.jsonl"
SPECIAL = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>")
# What the tokenizer of a multimodal model has besides, and the fields of its config that name them.
VISION_SPECIAL = {
    "<|IMAGE_START|>": "image_start_token_id",
    "<|IMAGE_END|>": "image_end_token_id",
    "<|VIDEO_START|>": "video_start_token_id",
    "<|VIDEO_END|>": "video_end_token_id",
    "<|IMAGE_PLACEHOLDER|>": "im_patch_id",
}


def make(folder: Path, name: str = "tiny-dense", seed: int = 0) -> None:
    """Write the model `name` of `ernie.models.TINY`, in float32, with a tokenizer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with TEXTS.open(encoding="utf-8") as lines:
        texts = [text for line in lines for part in json.loads(line).values() for text in part]
    config = TINY[name]
    has_vision = config.vision_config is not None
    train_tokenizer(folder, texts, vocab_size=1000, has_vision=has_vision)
    save_new(folder, config, seed=seed)


def save_new(folder: Path, config: ErnieConfig, *, seed: int) -> None:
    """Write a model with random weights beside its tokenizer, whose ids its config takes over."""
    tokenizer = ernie.Tokenizer.from_folder(folder)
    ids = {key: tokenizer.id_of(token) for token, key in VISION_SPECIAL.items()}
    marks = ids | {"video_token_id": None} if config.vision_config else {}
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, **marks)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=seed)
    model.tokenizer = tokenizer
    ernie.save(model, folder)


def train_tokenizer(
    folder: Path, texts: Iterable[str], *, vocab_size: int, has_vision: bool = False
) -> None:
    """Write a SentencePiece tokenizer trained on texts, with the control tokens of the family."""
    symbols = [*SPECIAL]
    if has_vision:
        symbols += [
            token for token in (*VISION_SPECIAL, "<think>", "</think>") if token not in SPECIAL
        ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        control_symbols=["<mask:1>"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "mask_token": "<mask:1>",
        "additional_special_tokens": ["<|IMAGE_PLACEHOLDER|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], *([name] for name in TINY)):
        sys.exit(f"usage: python examples/tiny_model.py FOLDER [{'|'.join(TINY)}]")
    make(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "tiny-dense")
