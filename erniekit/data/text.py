"""Records of plain text to tokens: what a model is pre-trained on (stage: PT).

    {"text": "..."}             a document
    {"text": ["...", "..."]}    several
    token ids                   a document of an indexed file (`erniekit.data.indexed`), as it is

A document is its tokens and the end token, with no begin token, as in ERNIEKit; every token but the
first is trained, so that a document of n tokens has n - 1 places in rows. It is as long as it is:
packing cuts it where a row is full (`erniekit.data.pack`). Text that spells a control token stays
text. What cannot be used raises `DataError`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer, TokenizerError
from erniekit.data.dialogue import Dialogue, Encoder, Sample
from erniekit.data.fields import kind_of, texts_of
from erniekit.data.sources import DataError


class TextEncoder(Encoder):
    """Turns documents into samples, whole. It has no chat template.

    `counts` has: tokens of the samples and the trained ones of them.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        if tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer names no eos_token, which ends a document; name one in "
                "tokenizer_config.json"
            )
        self.tokenizer, self.max_tokens, self.end_id = tokenizer, max_tokens, tokenizer.eos_id
        self.counts: Counter[str] = Counter()

    def dialogues(self, record: Any, kind: str) -> list[Dialogue]:
        raise DataError("plain text has no dialogues")

    def read(self, record: Any, kind: str) -> list[Sample]:
        """One sample for each document of a record."""
        if isinstance(record, np.ndarray):
            samples = [self._sample(self._checked(record))]
        elif isinstance(record, dict):
            samples = [self._sample(self.document(text)) for text in texts_of(record, "text")]
        else:
            raise DataError(f"{kind_of(record)}; expected an object with text")
        self.counts["tokens"] += sum(map(len, samples))
        self.counts["trained tokens"] += sum(map(len, samples))
        return samples

    def document(self, text: str) -> list[int]:
        """The tokens of a text and the end token."""
        try:
            return [*self.tokenizer.encode(text), self.end_id]
        except TokenizerError as error:
            raise DataError(str(error), at="text") from None

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        size = self.tokenizer.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            wrong = int(ids.max() if ids.max() >= size else ids.min())
            raise DataError(
                f"token {wrong} is not among the {size} of the tokenizer; the file was made with "
                "another one"
            )
        return ids

    def _sample(self, ids: Sequence[int] | np.ndarray) -> Sample:
        if len(ids) < 2:
            raise DataError(f"a document of {len(ids)} tokens; nothing follows that can be trained")
        kept = array("i", ids.tolist() if isinstance(ids, np.ndarray) else ids)
        return Sample(kept[:-1], kept[1:])


def bytes_by_token(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, int64 `(vocab_size,)`; 0 for special ones."""
    sizes = [len(tokenizer.join_bytes([i], skip_special=True)) for i in range(tokenizer.vocab_size)]
    return np.array(sizes, np.int64)
