"""Pictures within the messages of other forms, as parts of a chat's messages.

    responses    {"type": "input_image", "image_url": URL, "detail": ...}
    messages     {"type": "image", "source": {"type": "base64", "media_type": ..., "data": ...}}
                 {"type": "image", "source": {"type": "url", "url": URL}}
    chat         {"type": "image_url", "image_url": {"url": URL}, "sent_as": "input[0].content[1]"}

What a URL may reach, what a picture may be and how many there may be is settled where chats are
read. An error names the part by the place that the request has it at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ernie.chat import ChatError
from ernie.vision.sources import MediaError
from fastdeploy.errors import RequestError
from fastdeploy.server.protocol import ChatRequest

Part = dict[str, Any]

DETAILS = ("auto", "low", "high", "original")  # of the OpenAI API; they change nothing here
_PLACE = re.compile(r"messages\[(\d+)\](?:\.content\[(\d+)\])?")
_MEDIA_TYPE = re.compile(r"image/[a-z0-9.+-]{1,64}")


def of_input_image(part: Mapping[str, Any], where: str) -> Part:
    """A part of the type `input_image`. Raises ValueError saying what is wrong with it."""
    if part.get("file_id") is not None:
        raise ValueError("names a file by file_id, and this server keeps no files; send image_url")
    url, detail = part.get("image_url"), part.get("detail")
    if not isinstance(url, str):
        raise ValueError("has no image_url; send a URL, data: too, as a text")
    if detail is not None and detail not in DETAILS:
        raise ValueError(f"has the detail {str(detail)[:64]!r}; it takes one of {_listed(DETAILS)}")
    return _picture(url, where)


def of_image_block(block: Mapping[str, Any], where: str) -> Part:
    """A block of the type `image`. Raises ValueError saying what is wrong with it."""
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("base64", "url"):
        given = f"the type {str(kind)[:64]!r}" if isinstance(source, Mapping) else "no object"
        raise ValueError(f"has a source of {given}; it takes base64 or url, for no files are kept")
    if kind == "url":
        if not isinstance(source.get("url"), str):
            raise ValueError("has a source without url; send one as a text")
        return _picture(source["url"], where)
    media_type, data = source.get("media_type"), source.get("data")
    if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
        raise ValueError(
            f"has the media_type {str(media_type)[:64]!r}; it takes one of images, as image/png"
        )
    if not isinstance(data, str):
        raise ValueError("has a source without data; send the file's bytes in base64")
    return _picture(f"data:{media_type};base64,{data}", where)


def joined(parts: Sequence[Part]) -> str | list[Part]:
    """The content of a chat's message: texts that follow each other are lines of one; a text alone
    is a str.
    """
    content: list[Part] = []
    for part in parts:
        if part["type"] == "text" and content and content[-1]["type"] == "text":
            content[-1] = {"type": "text", "text": f"{content[-1]['text']}\n{part['text']}"}
        else:
            content.append(part)
    if len(content) == 1 and content[0]["type"] == "text":
        return content[0]["text"]
    return content or ""


@contextmanager
def told_as_sent(chat: ChatRequest, field: str) -> Iterator[None]:
    """Have errors about the messages of a chat, which may change meanwhile, name the place in the
    request that it is made of, in whose `field` they stand. Messages and pictures carry it as
    `sent_as`.
    """

    try:
        yield
    except (ChatError, MediaError, RequestError) as error:
        if isinstance(error, RequestError) and error.param != "messages":
            raise
        if (place := _PLACE.match(told := str(error))) and chat.messages:
            message, n = chat.messages[int(place[1])], place[2]
            sent = message if n is None else message["content"][int(n)]
            told = sent.get("sent_as", place[0]) + told[place.end() :]
        raise RequestError(told, param=field) from None


def _picture(url: str, where: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url}, "sent_as": where}


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
