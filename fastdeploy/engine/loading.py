"""A model with everything that stands around it, loaded from one folder by one config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ernie
from ernie.chat import ChatTemplate, NoTemplate, stop_ids
from ernie.fused import fuse, shallow_copy
from ernie.model import ErnieModel
from ernie.quant.scheme import read_scheme
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.sampling import recommended


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and the two sides of its text. Without a tokenizer it takes and gives token ids."""

    engine: Engine
    config: EngineConfig  # resolved
    tokenizer: Tokenizer | None
    template: ChatTemplate | None  # None where the folder has none
    defaults: dict[str, float]  # sampling settings that the model's folder recommends


def load(config: EngineConfig, model: ErnieModel | None = None) -> Loaded:
    """Read model, tokenizer and chat template; `model` stands in for one that is in memory already.

    Raises ConfigError and the errors of `ernie.load`, each one sentence.
    """
    device = pick_device(config.device)
    if model is None:
        dtype = getattr(torch, config.dtype)
        model = ernie.load(config.model, dtype=dtype, device=device, keep_integers=True)
    else:
        model = shallow_copy(model)  # the caller keeps the plain one
    tokenizer = Tokenizer.from_folder(config.tokenizer) if config.tokenizer else model.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the model's vocabulary "
            f"{model.config.vocab_size}; they do not belong together"
        )
    model = served(model, config)
    config = config.resolved(
        max_positions=model.config.max_position_embeddings, device_type=model.device.type
    )
    ends = stop_ids(tokenizer) if tokenizer else model.config.eos_token_ids
    tags = ThinkTags.of(tokenizer, config.think_stop_sentence)
    engine = Engine(model, config, ends, tags, rebuild=partial(served, config=config))
    defaults = recommended(getattr(model, "generation_config", None) or {})
    return Loaded(engine, config, tokenizer, _template(config, tokenizer), defaults)


def served(model: ErnieModel, config: EngineConfig) -> ErnieModel:
    """The form in which the engine runs a plain model, whose blocks are swapped in place.

    Raises ConfigError for a scheme that is not known, or that is asked of a quantised folder.
    """
    if config.quantization and "quantization_config" in model.config.extra:
        raise ConfigError(
            f"quantization={config.quantization} is asked for, but the folder's weights are "
            "quantised already; leave it out"
        )
    return fuse(model, read_scheme(config.quantization, has_experts=model.config.is_moe))


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not known; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={name!r}, but there is no GPU that torch can use; use cpu or auto"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton starts its kernels on the current one
    return device


def _template(config: EngineConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if tokenizer is None:
        return None
    if config.chat_template is not None:
        return template_of(config.chat_template, tokenizer)
    try:
        return ChatTemplate.for_folder(tokenizer.files[0].parent, tokenizer)
    except NoTemplate:
        return None  # a base model: completions work, and chat says what is missing


def template_of(text_or_path: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template given as Jinja text, or as the path of a file that holds it."""
    source, where = text_or_path, "the given chat_template"
    if "{" not in text_or_path:
        path = Path(text_or_path)
        if not path.is_file():
            raise ConfigError(f"chat_template={text_or_path!r} is neither Jinja text nor a file")
        source, where = path.read_text(encoding="utf-8"), str(path)
    return ChatTemplate.from_sources({"default": source}, where, tokenizer)
