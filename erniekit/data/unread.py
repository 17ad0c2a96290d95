"""Keys of records that nothing reads: told, because what stands under them is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from erniekit.data.dialogue import Encoder
from erniekit.data.judged import JudgedEncoder
from erniekit.data.pictures import FOLDER, KINDS
from erniekit.data.preference import PairEncoder
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.data.text import TextEncoder

Keys = Mapping[str, Collection[str]]  # by format

_DIALOGUE: Keys = {
    "erniekit": {"src", "tgt", "system", "is_system", "label"},
    "alpaca": {"instruction", "input", "output", "history", "system"},
    "messages": {"messages", "system", "tools"},
    "sharegpt": {"conversations", "system", "tools"},
}
_PAIR: Keys = {
    "erniekit": {"src", "tgt", "system", "response", "sort", "tools"},
    "alpaca": {"question", "input", "chosen", "rejected", "history", "system", "tools"},
    "messages": {"prompt", "chosen", "rejected", "system", "tools"},
}
_ANSWER: Keys = {
    "erniekit": {"src", "tgt", "system", "response", "label", "kto_tag", "tools"},
    "alpaca": {*_DIALOGUE["alpaca"], "label", "kto_tag", "tools"},
    "messages": {"messages", "prompt", "completion", "label", "kto_tag", "system", "tools"},
}
_DOCUMENT: Keys = {"erniekit": {"text"}, "pretrain": {"text"}}
_READ: dict[type[Encoder], Keys] = {
    Encoder: _DIALOGUE,
    PairEncoder: _PAIR,
    JudgedEncoder: _ANSWER,
    TextEncoder: _DOCUMENT,
}
_PICTURES = {FOLDER, *(f"{kind}s" for kind in KINDS)}  # the folder is put there by the source
# Of dialogues of type erniekit that have pictures, by the key that tells the two forms apart.
_PICTURED = {
    "text_info": {"text_info", "order", "is_system", "system", "tools"}
    | {f"{kind}_info" for kind in KINDS},
    "query": {"query", "response", "history", "system", "tools"},
}


def unread(encoder: Encoder, record: Any, kind: str) -> set[str]:
    """The keys of a record of a format that an encoder does not read; none of a record that is no
    object, or of one that is made (reasoning_gym).
    """
    kind = "messages" if kind == "chatml" else kind
    keys = _READ[type(encoder)].get(kind)
    if keys is None or not isinstance(record, dict):
        return set()
    return record.keys() - keys - set(_of_pictures(encoder, record, kind))


def of_first_records(stream: Stream) -> list[str]:
    """`key (file)` for what is not read of the first record of each file that is drawn from."""
    found = []
    for number in sorted(stream.mix.drawn):
        source = stream.sources[number]
        with contextlib.suppress(DataError):  # told where it is read to be trained
            keys = unread(stream.encoder, source[0], stream.kinds[number])
            found += [f"{key} ({source.path})" for key in sorted(keys)]
    return found


def _of_pictures(encoder: Encoder, record: Mapping[str, Any], kind: str) -> Iterator[str]:
    """What is read where the model reads pictures."""
    if encoder.reader is None:
        return
    yield from _PICTURES
    if type(encoder) is Encoder and kind == "erniekit":
        own = next((key for key in _PICTURED if key in record), "src")
        yield from _PICTURED.get(own, ())
