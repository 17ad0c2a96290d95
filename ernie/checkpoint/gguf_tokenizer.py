"""The tokenizer inside a GGUF file, read into the files of a model folder and written from them.

    "gpt2"    byte-level BPE: tokens, merges, and the name of how text is split first
    "llama"   SentencePiece BPE: tokens with scores; the best-scored neighbours merge first
    "none"    no tokenizer; programs then talk to the model in token ids

Ids without an entry are written as unused tokens `[PAD<id>]` and are left out again when read.
Refused: other kinds, and byte-level splits that have no name here; never a near miss, because a
model reads rubbish from a tokenizer that is almost right.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie.chat.folder import folder_sources
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.gguf_names import TOKEN_IDS
from ernie.checkpoint.io import as_json
from ernie.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of GGUF


def splits() -> dict[str, list[Any]]:
    """Names of byte-level splits -> the pre-tokenizers they stand for, one after another."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits

    return {
        "gpt-2": [ByteLevel(add_prefix_space=False)],
        "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    }


# --- from GGUF to files ---


def tokenizer_files(meta: Mapping[str, Any], source: str | Path) -> dict[str, str]:
    """tokenizer.json, and tokenizer_config.json with the chat template; nothing for "none".

    Raises CheckpointError for a tokenizer that these files cannot express.
    """
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind in ("none", "no_vocab"):
        return {}
    tokens = meta.get("tokenizer.ggml.tokens", [])
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for key, name in TOKEN_IDS.items()}
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise CheckpointError(f"{source} says {name} is token {i} of {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{source} lists a token twice; write the file anew")
    if kind == "gpt2" and pre in splits():
        library = _byte_level_bpe(meta, splits()[pre], source)
    elif kind == "llama" and meta.get("tokenizer.ggml.add_space_prefix", True) is False:
        library = _sentencepiece_bpe(meta, source)
    else:
        raise CheckpointError(
            f"the tokenizer of {source} is of kind {kind!r}, {pre!r}; only byte-level BPE ('gpt2') "
            f"with the splits {' and '.join(map(repr, splits()))}, and SentencePiece ('llama') "
            "without a space in front of every text, can be imported"
        )
    types = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    for kept, add in ((CONTROL, library.add_special_tokens), (USER_DEFINED, library.add_tokens)):
        add([_added(token) for token, of in zip(tokens, types) if of == kept])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    }
    if "tokenizer.chat_template" in meta:
        settings["chat_template"] = meta["tokenizer.chat_template"]
    return {
        "tokenizer.json": library.to_str(pretty=True),
        "tokenizer_config.json": as_json(settings),
    }


def _added(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, normalized=False)


def _used(meta: Mapping[str, Any]) -> dict[str, int]:
    tokens = meta.get("tokenizer.ggml.tokens", [])
    types = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    return {token: i for i, (token, of) in enumerate(zip(tokens, types)) if of != UNUSED}


def _byte_level_bpe(meta: Mapping[str, Any], split: Sequence[Any], source: str | Path) -> Any:
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import Sequence as Steps

    ids = _used(meta)
    merges = [tuple(merge.split(" ")) for merge in meta.get("tokenizer.ggml.merges", [])]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ids.keys():
            raise CheckpointError(
                f"merge {' '.join(merge)!r} of {source} is not of two tokens to a third; "
                "write the file anew"
            )
    library = Tokenizer(models.BPE(vocab=ids, merges=merges))
    library.pre_tokenizer = Steps(list(split))
    library.decoder = decoders.ByteLevel()
    return library


def _sentencepiece_bpe(meta: Mapping[str, Any], source: str | Path) -> Any:
    """The scores become an order of merges: every way to put a piece together, best piece first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = _used(meta)
    scores, types = (meta.get(f"tokenizer.ggml.{k}", []) for k in ("scores", "token_type"))
    size = len(meta.get("tokenizer.ggml.tokens", []))
    if len(scores) != size or len(types) != size:
        raise CheckpointError(
            f"{source} has {size} tokens with {len(scores)} scores and {len(types)} types; "
            "a 'llama' tokenizer needs one of each for a token: write the file anew"
        )
    pieces = [token for token, i in ids.items() if types[i] == NORMAL]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda p: -scores[ids[p]])
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    unknown = next((token for token, i in ids.items() if types[i] == UNKNOWN), None)
    bpe = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    library = Tokenizer(bpe)
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return library


# --- from files to GGUF ---


def write_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Put the tokenizer of a model folder, or "none", into the metadata of a GGUFWriter.

    Raises CheckpointError for a kind that llama.cpp would read in another way than we do.
    """
    if not Tokenizer.exists(folder):
        log.warning(
            "%s holds no tokenizer: llama.cpp's library loads the file and takes token ids, its "
            "server and command line need one and stop",
            folder,
        )
        writer.add_tokenizer_model("none")
        return
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, but config.json "
            f"says vocab_size={vocab_size}; it belongs to another model"
        )
    tokens = [tokenizer.token_of(i) or f"[PAD{i}]" for i in range(vocab_size)]
    types = [_type_of(tokenizer, i) for i in range(vocab_size)]
    if (folder / "tokenizer.model").is_file():
        _write_sentencepiece(writer, folder / "tokenizer.model", types)
    else:
        _write_byte_level(writer, folder / "tokenizer.json", tokens, types)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(False)  # as everywhere here: templates write what they want
    writer.add_add_space_prefix(False)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    template = folder_sources(folder)[0].get("default")
    if template is not None:
        writer.add_chat_template(template)


def _type_of(tokenizer: Tokenizer, i: int) -> int:
    token = tokenizer.token_of(i)
    if token is None:
        return UNUSED
    if i in tokenizer.special_ids:
        return UNKNOWN if i == tokenizer.unk_id and token == "<unk>" else CONTROL
    return USER_DEFINED if token in tokenizer.control_tokens else NORMAL


def _write_sentencepiece(writer: Any, path: Path, types: list[int]) -> None:
    """Scores of the pieces; `types` is completed by what the file says of ordinary ones."""
    scores = [0.0] * len(types)
    model_kind, normalisation, index = None, "", 0
    for number, value in _fields(path.read_bytes()):
        if number == 1:  # a piece: text, score, type (of SentencePiece, which GGUF took over)
            said = dict(_fields(value))
            (scores[index],) = struct.unpack("<f", said.get(2, bytes(4)))
            if types[index] == NORMAL:
                types[index] = said.get(3, NORMAL)
            index += 1
        elif number == 2:
            model_kind = dict(_fields(value)).get(3, 1)
        elif number == 3:
            normalisation = dict(_fields(value)).get(1, b"").decode()
    if model_kind != 2:
        raise CheckpointError(
            f"{path} is a SentencePiece model of type {model_kind}; only BPE (2) can be exported"
        )
    if normalisation not in ("", "identity"):
        log.warning(
            "%s normalises text by %r, which llama.cpp does not do: text with full-width or "
            "composed characters becomes other tokens there",
            path,
            normalisation,
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer message: an integer, or the bytes of anything else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[position : position + size]
        position += size


def _write_byte_level(writer: Any, path: Path, tokens: list[str], types: list[int]) -> None:
    from tokenizers import Tokenizer as Library

    spec = json.loads(path.read_text("utf-8"))
    library = Library.from_str(json.dumps(spec))
    steps = _steps(spec.get("pre_tokenizer"))
    names = [name for name, split in splits().items() if steps == [_state(s) for s in split]]
    if type(library.decoder).__name__ != "ByteLevel" or not names or spec.get("normalizer"):
        kinds = [step.get("type") for step in steps]
        raise CheckpointError(
            f"{path} splits text by {kinds}, which has no name in GGUF here; export a model with "
            "a SentencePiece tokenizer.model, or with the byte-level splits "
            f"{' or '.join(map(repr, splits()))}"
        )
    for entry in spec.get("added_tokens") or []:
        if types[entry["id"]] == NORMAL:
            types[entry["id"]] = USER_DEFINED
    known = set(tokens)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    assert all("".join(m.split(" ")) in known for m in merges)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[0])
    writer.add_token_merges(merges)


def _state(pre_tokenizer: Any) -> dict[str, Any]:
    return json.loads(pre_tokenizer.__getstate__())


def _steps(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for inner in spec["pretokenizers"] for step in _steps(inner)]
    return [spec]
