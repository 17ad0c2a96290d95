"""What a user says in words and pictures, as token ids: chat prompts and bad words. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie.chat import ChatTemplate
from ernie.chat.messages import pictures_of
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Inputs, Processor
from fastdeploy.errors import RequestError
from fastdeploy.sampling import SamplingParams

# Arguments of the rendering itself: a request may not set them through chat_template_kwargs.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "tokenize", "chat_template"})
PROCESSOR_ARGUMENTS = frozenset({"options", "seed"})  # of `Processor.inputs`, not of templates


def chat_prompt(
    template: ChatTemplate | None,
    tokenizer: Tokenizer | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation up to where the answer begins, or (without
    `add_generation_prompt`) up to where the last message ends.

    What the messages say stays text, even where it spells a control token. Raises RequestError, or
    ChatError naming the message at fault.
    """
    template, tokenizer = _checked(template, tokenizer, options)
    if template.reads and pictures_of(messages):
        raise RequestError("pictures are read by chat completions only", param="messages")
    return template.encode(
        tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt, **options
    ).token_ids


def chat_inputs(
    processor: Processor,
    template: ChatTemplate | None,
    tokenizer: Tokenizer | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
) -> Inputs:
    """`chat_prompt` with the pictures of the messages, which are fetched and read here; `changes`
    are `mm_processor_kwargs`. Raises MediaError as well, naming the part at fault.
    """
    template, tokenizer = _checked(template, tokenizer, options)
    return processor.inputs(
        template,
        tokenizer,
        messages,
        options=changes,
        tools=tools,
        add_generation_prompt=True,
        **options,
    )


def _checked(
    template: ChatTemplate | None, tokenizer: Tokenizer | None, options: Mapping[str, Any]
) -> tuple[ChatTemplate, Tokenizer]:
    if template is None or tokenizer is None:
        raise RequestError(
            "the model has no chat template; use completions, or start with chat_template",
            param="messages",
        )
    for key in (RESERVED | PROCESSOR_ARGUMENTS) & options.keys():
        raise RequestError(
            f"chat_template_kwargs sets {key!r}, which belongs to the request itself",
            param="chat_template_kwargs",
        )
    return template, tokenizer


def banned_sequences(
    tokenizer: Tokenizer | None, params: SamplingParams
) -> frozenset[tuple[int, ...]]:
    """The tokens of each of `bad_words`, as it stands and with a space in front."""
    banned: set[tuple[int, ...]] = set()
    for word in params.bad_words or ():
        if tokenizer is None:
            raise RequestError("bad_words needs a tokenizer, and the model has none")
        banned.update(tuple(tokenizer.encode(text)) for text in (word, " " + word))
    return frozenset(banned)
