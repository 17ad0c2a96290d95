"""The two file formats of a tokenizer, both read into a `Vocabulary`.

Refused: models other than BPE in tokenizer.json, files that contradict each other, and tokenizers
that put a space in front of every text (a dialogue is encoded in parts; each part would get one).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from ernie.json_files import read_object
from ernie.special_tokens import Declared, TokenizerError, is_tag

_KNOWN_DECODERS = {"ByteLevel", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip", "Sequence"}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass
class Vocabulary:
    """What either file format is read into."""

    encode: Callable[[str], list[int]]  # plain text only: yields no control token
    id_by_token: dict[str, int]
    bytes_of: Callable[[str], bytes]
    control: set[str]
    special: set[str]


def read_tokenizers(path: Path, declared: Declared) -> Vocabulary:
    """Read tokenizer.json, taking the control tokens out of the library's hands.

    Besides the list of added tokens, they go from the vocabulary and the merges too, where a
    conversion from SentencePiece can have left a way to merge one out of plain characters.
    """
    spec = read_object(path, TokenizerError)
    model = spec.get("model") or {}
    vocab: dict[str, int] = model.get("vocab") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(
            f"{path} holds a {model.get('type', 'missing')!r} model; ERNIE 4.5 tokenizers are 'BPE'"
        )
    added = spec.get("added_tokens") or []
    for entry in added:
        declared.take_flags(entry)
    ids = _joined_ids(path, vocab, {entry["content"]: entry["id"] for entry in added}, declared.ids)
    special = {token for token in ids if declared.is_special(token)}
    known = vocab.keys() | {entry["content"] for entry in added}
    control = special | {token for token in ids if is_tag(token) or token not in known}

    kept = [entry for entry in added if entry["content"] not in control]
    # The library numbers added tokens itself unless the vocabulary knows them.
    vocab = {token: i for token, i in vocab.items() if token not in control}
    vocab |= {entry["content"]: entry["id"] for entry in kept}
    if model.get("unk_token") in control:  # must exist, and must not be spelled by any text
        unknown = secrets.token_hex(16)
        vocab[unknown] = ids[model["unk_token"]]
        model = model | {"unk_token": unknown}
    merges = [m for m in model.get("merges", []) if control.isdisjoint(_merge_parts(m))]
    plain = spec | {
        "model": model | {"vocab": vocab, "merges": merges, "dropout": None},
        "added_tokens": kept,
        "post_processor": None,  # nothing is added on its own
        "truncation": None,  # and nothing is cut
        "padding": None,
    }
    library = _library_tokenizer(path, plain)
    literal = {entry["content"] for entry in added} | control
    decoders = _decoder_types(spec.get("decoder"))
    if not decoders or decoders - _KNOWN_DECODERS:
        raise TokenizerError(
            f"{path} has the decoder {sorted(decoders)}; known are those of byte-level BPE "
            "('ByteLevel') and of SentencePiece ('Replace' or 'Metaspace', 'ByteFallback', 'Fuse')"
        )
    byte_level = "ByteLevel" in decoders

    def bytes_of(token: str) -> bytes:
        if token in literal:
            return token.encode()
        return _bytes_of_byte_level(token) if byte_level else _bytes_of_piece(token)

    vocabulary = Vocabulary(
        encode=partial(_encode_with_tokenizers, library),
        id_by_token=ids,
        bytes_of=bytes_of,
        control=control,
        special=special,
    )
    _refuse_prefix_space(path, vocabulary)
    return vocabulary


def read_sentencepiece(path: Path, declared: Declared) -> Vocabulary:
    """Read tokenizer.model, making control tokens of the kind the library never finds in text."""
    data = path.read_bytes()
    library = _library_sentencepiece(path, data)
    indices = list(range(len(library)))
    pieces: list[str] = library.id_to_piece(indices)
    hidden = {
        piece
        for piece, is_control, is_unknown in zip(
            pieces, library.is_control(indices), library.is_unknown(indices)
        )
        if is_control or is_unknown
    }
    ids = _joined_ids(path, {piece: i for i, piece in enumerate(pieces)}, declared.ids)
    special = hidden | {token for token in ids if declared.is_special(token)}
    control = special | {token for token in ids if is_tag(token) or ids[token] >= len(pieces)}
    for name, index in (("bos_token", library.bos_id()), ("eos_token", library.eos_id())):
        if index >= 0:
            declared.names.setdefault(name, pieces[index])
    declared.names.setdefault("unk_token", pieces[library.unk_id()])

    edited = _with_hidden_pieces(data, {ids[t] for t in control - hidden if ids[t] < len(pieces)})
    if declared.add_prefix_space is False:
        # normalizer_spec { add_dummy_prefix: false }: a repeated message is merged into the first
        edited += b"\x1a\x02\x18\x00"
    library = _library_sentencepiece(path, edited)
    vocabulary = Vocabulary(
        encode=partial(_encode_with_sentencepiece, library),
        id_by_token=ids,
        bytes_of=lambda token: token.encode() if token in control else _bytes_of_piece(token),
        control=control,
        special=special,
    )
    _refuse_prefix_space(path, vocabulary)
    return vocabulary


def _joined_ids(path: Path, *sources: dict[str, int]) -> dict[str, int]:
    """One map of token to id; two ids for a token or two tokens for an id are refused."""
    ids: dict[str, int] = {}
    for source in sources:
        for token, i in source.items():
            if ids.setdefault(token, i) != i:
                raise TokenizerError(
                    f"{path} and the files beside it disagree: {token!r} is {ids[token]} and {i}"
                )
    tokens: dict[int, str] = {}
    for token, i in ids.items():
        if tokens.setdefault(i, token) != token:
            raise TokenizerError(
                f"{path} and the files beside it disagree: id {i} is {tokens[i]!r} and {token!r}"
            )
    return ids


def _library_tokenizer(path: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"{path} is not a tokenizer the tokenizers library reads: {error}"
        ) from None


def _library_sentencepiece(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise TokenizerError(
            f"{path} ({len(data)} bytes) is not a SentencePiece model, or was cut short"
        ) from None


def _encode_with_tokenizers(library: tokenizers.Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def _encode_with_sentencepiece(
    library: sentencepiece.SentencePieceProcessor, text: str
) -> list[int]:
    return library.encode(text)


def _refuse_prefix_space(path: Path, vocabulary: Vocabulary) -> None:
    token_by_id = {i: token for token, i in vocabulary.id_by_token.items()}
    first = vocabulary.encode("a")[:1]
    if first and vocabulary.bytes_of(token_by_id[first[0]]).startswith(b" "):
        raise TokenizerError(
            f"{path} puts a space in front of every text, which ERNIE 4.5 tokenizers do not; "
            'train it with --add_dummy_prefix=false, or set "add_prefix_space": false in '
            "tokenizer_config.json if the model was trained without"
        )


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    inner = (_decoder_types(d) for d in decoder.get("decoders", []))
    return {decoder.get("type", "")}.union(*inner)


def _merge_parts(merge: str | list[str]) -> set[str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _bytes_of_piece(piece: str) -> bytes:
    """SentencePiece spelling: `<0x0A>` is a byte, `▁` a space."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _byte_by_character() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character: itself, or the next one from
    U+0100 on.

    Source: the byte table of GPT-2, which every byte-level tokenizer.json shares.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_BY_CHARACTER = _byte_by_character()


def _bytes_of_byte_level(token: str) -> bytes:
    if not _BYTE_BY_CHARACTER.keys() >= set(token):
        return token.encode()
    return bytes(_BYTE_BY_CHARACTER[c] for c in token)


def _with_hidden_pieces(proto: bytes, indices: set[int]) -> bytes:
    """The SentencePiece model with some pieces retyped to CONTROL, which encoding never finds in
    text.

    A ModelProto is a list of tagged fields; every field 1 is a piece. A later value of a scalar
    field wins, so appending `type: CONTROL` (bytes 0x18 0x03) to a piece is enough.
    Source: sentencepiece_model.proto; protocol buffers wire format.
    """
    if not indices:
        return proto
    out, position, index = bytearray(), 0, 0
    while position < len(proto):
        start = position
        tag, position = _varint(proto, position)
        if (
            tag & 7 != 2
        ):  # a ModelProto has only length-delimited fields; keep what follows as it is
            return bytes(out + proto[start:])
        length, position = _varint(proto, position)
        body = proto[position : position + length]
        position += length
        if tag == 0x0A:
            if index in indices:
                body += b"\x18\x03"
            index += 1
            out += b"\x0a" + _as_varint(len(body)) + body
        else:
            out += proto[start:position]
    return bytes(out)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
