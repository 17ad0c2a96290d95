"""Pre-training on plain text, from random weights or from a model: the story of
`erniekit.recipes.sft` with documents instead of dialogues.

Every token but the first of a document is trained, end tokens too; rows are full, documents in them
do not see each other, and nothing is lost where one is cut (`erniekit.data.text`,
`erniekit.data.pack`).
"""

from __future__ import annotations

import dataclasses
from functools import partial

from ernie.checkpoint.hub import resolve
from ernie.tokenizer import Tokenizer
from erniekit.config import Run, resolved
from erniekit.data.text import bytes_by_token
from erniekit.evaluate import evaluate
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.recipes import sft


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    run = resolved(run, device)
    return sft.train(run, device, method(run, device), ranks)


def method(run: Run, device: str, *, is_kept: bool = True) -> Method:
    """The next-token loss, and on held-out documents also bits per byte."""
    tokenizer = Tokenizer.from_folder(resolve(run.model.model_name_or_path))
    chunk_size = run.model.loss_subbatch_seqlen
    measured = partial(evaluate, chunk_size=chunk_size, bytes_V=bytes_by_token(tokenizer))
    return dataclasses.replace(sft.method(run, device, is_kept=is_kept), evaluate=measured)
