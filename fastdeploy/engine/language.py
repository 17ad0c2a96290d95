"""What stands between a user's words and the engine's token ids: tokenizer and chat template.

Imports no torch: a server reads this while the engine, in another process, reads the weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ernie.chat import ChatTemplate, NoTemplate, changes
from ernie.checkpoint.hub import resolve
from ernie.config import ErnieConfig
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from fastdeploy.config import EngineConfig

log = logging.getLogger("fastdeploy")


@dataclass(frozen=True, slots=True)
class Language:
    """The words of one model. Of `config`, `max_model_len` is resolved and the rest as given."""

    config: EngineConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None where the folder has none

    @classmethod
    def read(cls, config: EngineConfig) -> Language:
        """Raises ConfigError for a folder without a tokenizer, and what reading one raises."""
        folder = Path(config.tokenizer) if config.tokenizer else resolve(config.model)
        if not Tokenizer.exists(folder):
            raise ConfigError(f"{config.model} has no tokenizer; give one with --tokenizer")
        tokenizer = Tokenizer.from_folder(folder)
        network = ErnieConfig.from_folder(resolve(config.model))
        longest = config.length_for(network.max_position_embeddings)
        config = replace(config, max_model_len=longest)
        language = cls(config, tokenizer, template_for(config, tokenizer))
        language.check_training(resolve(config.model), f"the model {config.model}")
        return language

    def check_training(self, folder: str | Path, what: str) -> None:
        """Raise ConfigError where the model (or adapter) in a folder was trained with another
        template or tokenizer, unless the config says that this is meant; then it is a warning.
        """
        found = changes(folder, self.template, self.tokenizer)
        if not found:
            return
        told = f"{what} would not be served as it was trained: {found}"
        if not self.config.ignore_training_template:
            raise ConfigError(
                f"{told}; put what it was trained with back, or set ignore_training_template "
                "(--ignore-training-template)"
            )
        log.warning("%s", told)


def template_for(config: EngineConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template that the config names, or that of the tokenizer's folder. Raises ConfigError."""
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
