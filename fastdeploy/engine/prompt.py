"""What a user says in words and pictures, as token ids and patches: chat prompts, prompts with
pictures, and bad words. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.chat import ChatTemplate
from ernie.chat.messages import pictures_of
from ernie.tokenizer import Tokenizer
from fastdeploy.errors import RequestError
from fastdeploy.sampling import SamplingParams

if TYPE_CHECKING:
    from ernie.vision.prompt import Inputs, Processor

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
        raise RequestError(
            "the messages hold pictures, of which no vectors are made; send text alone",
            param="messages",
        )
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
    add_generation_prompt: bool = True,
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
        add_generation_prompt=add_generation_prompt,
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


def picture_prompt(
    processor: Processor | None,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int],
    data: Any,
) -> Inputs:
    """A prompt with `data`, `{"image": [...], "video": [...]}`: see `Processor.prompt_inputs`. A
    path is a file that the caller may read, unlike one in a message.
    """
    if processor is None or tokenizer is None:
        lacks = "reads text only" if processor is None else "has no tokenizer"
        raise RequestError(f"multimodal_data is given, but this model {lacks}", param="prompt")
    if not isinstance(data, Mapping) or data.keys() - {"image", "video"}:
        shown = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise RequestError(
            f"multimodal_data is {shown}; it takes the keys 'image' and 'video', each with a list",
            param="prompt",
        )
    listed = []
    for kind in ("image", "video"):
        sources = data.get(kind) or ()
        sources = sources if isinstance(sources, (list, tuple)) else [sources]
        listed.append([_source(kind, number, source) for number, source in enumerate(sources)])
    return processor.prompt_inputs(tokenizer, prompt, *listed)


def _source(kind: str, number: int, source: Any) -> Any:
    """As in a part of a message, with files read."""
    if isinstance(source, Mapping):  # {"video": ..., "max_frames": 8}
        name = kind if kind in source else "url"
        options = {key: value for key, value in source.items() if key != name}
        return {**options, "url": _source(kind, number, source.get(name))}
    if isinstance(source, list):  # frames
        return [_source("image", number, frame) for frame in source]
    is_path = isinstance(source, Path) or (isinstance(source, str) and ":" not in source[:16])
    if not is_path:
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise RequestError(
            f"{kind}[{number}] of multimodal_data cannot be read: {error}", param="prompt"
        ) from None


def banned_sequences(
    tokenizer: Tokenizer | None, params: SamplingParams
) -> frozenset[tuple[int, ...]]:
    """The tokens of each of `bad_words`, as it stands and with a space in front, as plain text and
    with the control tokens that it spells.
    """
    banned: set[tuple[int, ...]] = set()
    for word in params.bad_words or ():
        if tokenizer is None:
            raise RequestError("bad_words needs a tokenizer, and the model has none")
        banned.update(
            tuple(tokenizer.encode(text, allow_special=allow_special))
            for text in (word, " " + word)
            for allow_special in (False, True)
        )
    return frozenset(banned)
