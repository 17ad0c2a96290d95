"""Text to token ids and back, for the tokenizer files of a model folder.

Two file formats, one behaviour: `ernie.vocabulary` reads `tokenizer.model` (SentencePiece) and
`tokenizer.json` into a function that encodes *plain* text, the bytes each id stands for, and the
control tokens. The libraries never see a control token: those are taken out of what they can
produce, and are only ever put in here. So text that spells `<|end_of_sentence|>` stays text, in
both formats, and also where a normaliser would turn full-width characters into that spelling.

Every id stands for a fixed byte string, so decoding is joining bytes, and streaming decode is an
incremental UTF-8 decoder whose cost per token does not grow. Nothing is added on its own: no bos,
no space in front.
"""

from __future__ import annotations

import codecs
import hashlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ernie.special_tokens import Declared, TokenizerError, control_pattern
from ernie.vocabulary import Vocabulary, read_sentencepiece, read_tokenizers

__all__ = ["FILES", "Detokenizer", "Tokenizer", "TokenizerError"]

MORE_TEMPLATES = "additional_chat_templates"  # the folder of those beside chat_template.jinja
# What travels with a tokenizer, as patterns; generation_config.json holds the ids that end an
# answer, training_template.json (`ernie.chat.lock`) what a model was trained with, and the last
# four how pictures become part of a prompt (`ernie.vision.settings`).
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    f"{MORE_TEMPLATES}/*.jinja",
    "chat_template.json",
    "generation_config.json",
    "training_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "Roboto-Regular.ttf",
)


class Tokenizer:
    """A byte-exact tokenizer; build it with `Tokenizer.from_folder`.

    `vocab_size` is the highest id plus one. It may be below the model's own vocabulary, which is
    padded: ids without an entry decode to nothing.
    """

    def __init__(self, vocabulary: Vocabulary, declared: Declared, files: Sequence[Path]):
        self.files = tuple(files)
        self._encode = vocabulary.encode
        self._id_by_token = vocabulary.id_by_token
        self.vocab_size = 1 + max(self._id_by_token.values())
        self._tokens: list[str | None] = [None] * self.vocab_size
        self._bytes = [b""] * self.vocab_size
        for token, i in self._id_by_token.items():
            self._tokens[i] = token
            self._bytes[i] = vocabulary.bytes_of(token)
        self._control = {token: self._id_by_token[token] for token in vocabulary.control}
        self._control_pattern = control_pattern(vocabulary.control, declared)
        self.special_ids = frozenset(self._id_by_token[token] for token in vocabulary.special)
        self.bos_id = self._named(declared, "bos_token")
        self.eos_id = self._named(declared, "eos_token")
        self.pad_id = self._named(declared, "pad_token")
        self.unk_id = self._named(declared, "unk_token")
        self.eos_ids = declared.eos_ids | ({self.eos_id} if self.eos_id is not None else set())
        self.names = declared.names

    @staticmethod
    def exists(path: str | Path) -> bool:
        """True if the folder holds a tokenizer this class reads."""
        return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model folder.

        Where both formats lie there, the one that knows more tokens is read, and tokenizer.json on
        a tie, because that is the file other engines read; a tokenizer.json with fewer entries than
        the tokenizer.model it was made from is an unfinished conversion.

        Raises TokenizerError, naming the file, if a file is missing, broken or contradicts another.
        """
        folder = Path(path)
        if not cls.exists(folder):
            raise TokenizerError(
                f"{folder} holds no tokenizer: expected tokenizer.json or tokenizer.model"
            )
        declared = Declared.read(folder)
        candidates = [
            read(folder / name, declared)
            for name, read in (
                ("tokenizer.json", read_tokenizers),
                ("tokenizer.model", read_sentencepiece),
            )
            if (folder / name).is_file()
        ]
        vocabulary = max(candidates, key=lambda v: len(v.id_by_token))  # the first of equals
        files = [path for name in FILES for path in sorted(folder.glob(name)) if path.is_file()]
        return cls(vocabulary, declared, files)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; control tokens it spells become ids only with `allow_special`."""
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in self.split_control(text):
            ids += [piece] if isinstance(piece, int) else self._encode_plain(piece)
        return ids

    def split_control(self, text: str) -> Iterator[str | int]:
        """`text` in order: the ids of the control tokens it spells, and the plain text between
        them.
        """
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            spelled = match.group()
            yield self._control[spelled if spelled in self._control else spelled.strip()]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without an entry nothing."""
        return self.join_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def join_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes `ids` stand for, which need not be whole characters."""
        skipped = self.special_ids if skip_special else frozenset()
        size = self.vocab_size
        return b"".join([self._bytes[i] for i in ids if 0 <= i < size and i not in skipped])

    def id_of(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it (`<|im_end|>`, `▁Hello`), or None."""
        return self._id_by_token.get(token)

    def token_of(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, or None where it has no entry."""
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else None

    @property
    def control_tokens(self) -> frozenset[str]:
        """Tokens that plain text cannot produce: the special ones and the tags of the chat
        templates.
        """
        return frozenset(self._control)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any token, its id or its being a control token
        changes.
        """
        digest = hashlib.sha256()
        for token in self._tokens:
            kind = "-" if token is None else "c" if token in self._control else "t"
            digest.update(f"{kind}{token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Copy the files this tokenizer was read from into a folder, which is made if needed."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for source in self.files:
            target = folder / source.relative_to(self.files[0].parent)
            if source.resolve() != target.resolve():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is the lone surrogate "
                f"{text[error.start]!r}; send the whole character it is half of"
            ) from None
        return self._encode(text)

    def _named(self, declared: Declared, name: str) -> int | None:
        token = declared.names.get(name)
        if token is None:
            return None
        if token not in self._id_by_token:
            raise TokenizerError(
                f"{declared.source.get(name, 'tokenizer_config.json')} names {name} {token!r}, "
                f"which is not among the {len(self._id_by_token)} entries of the vocabulary"
            )
        return self._id_by_token[token]


class Detokenizer:
    """Streaming decode: pieces of finished text whose concatenation is `Tokenizer.decode` of all
    ids; the special tokens in `shown` are not skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Collection[int] = ()
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids.difference(shown) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text completed by `ids`; the bytes of an unfinished character are kept for later."""
        visible = [i for i in ids if i not in self._skipped]
        return self._decoder.decode(self._tokenizer.join_bytes(visible))

    def flush(self) -> str:
        """The rest when no more ids come: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)
