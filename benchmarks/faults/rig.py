"""What the fault scripts share: a tiny random model, claims with their limits, the record.

A script breaks something in a real server and says, for each claim, what was measured and what the
limit is; it ends with status 1 when a limit is broken. The numbers are of this machine, the claims
are not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import write_record
from servers import Server, Stream, serving, streamed

FLAGS = ("--max-model-len", "2048", "--block-size", "16", "--dtype", "float32")


@dataclass(frozen=True)
class Claim:
    """`measured` may be at most `limit`."""

    what: str
    measured: float
    limit: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit

    def row(self) -> list[str]:
        said = "holds" if self.holds else "BROKEN"
        return [self.what, f"{self.measured:.4g} {self.unit}", f"{self.limit:g} {self.unit}", said]


def tiny_model(folder: Path, seed: int = 3) -> Path:
    """A random network that says something else for every prompt, with a tokenizer of bytes."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    import ernie
    from ernie.models import TINY

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    text.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        TINY["tiny-dense"], vocab_size=text.get_vocab_size(), max_position_embeddings=2048
    )
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=seed, std=0.3)
    ernie.save(model, folder)
    text.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    return folder


@contextlib.contextmanager
def tiny_server(*flags: str) -> Iterator[Server]:
    """A server of a tiny model; its log goes to a file that is forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "tiny")
        log = open(Path(folder) / "log", "w+")  # noqa: SIM115
        with log, serving(model, *FLAGS, *flags, log=log) as server:
            yield server


def body(nonce: int, max_tokens: int, length: int = 24) -> dict[str, Any]:
    """A greedy completion of a prompt that belongs to `nonce` alone."""
    numbers = random.Random(nonce)
    return {
        "prompt": [numbers.randrange(256) for _ in range(length)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def open_streams(
    server: Server, count: int
) -> tuple[list[Stream], list[asyncio.Task[Stream]], int]:
    """Long streams, all of them alive: the streams, their tasks and the engine's process."""
    streams = [Stream() for _ in range(count)]
    tasks = [
        asyncio.create_task(streamed(server, body(i, 1000), stream))
        for i, stream in enumerate(streams)
    ]
    while not all(stream.first for stream in streams):
        await asyncio.sleep(0.01)
    pid = server.engine_pid
    assert pid is not None
    return streams, tasks, pid


def raise_file_limit() -> None:
    """As many open sockets as the system lets us have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def script(what: str, doc: str, settings: dict[str, int], run: Callable[..., list[Claim]]) -> int:
    """The command line of a fault script: each setting is a flag. Returns the exit status."""
    question = doc.splitlines()[0]
    parser = argparse.ArgumentParser(description=question)
    for name, value in settings.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    chosen = vars(parser.parse_args())
    raise_file_limit()
    claims = run(**chosen)
    broken = [claim.what for claim in claims if not claim.holds]
    table = [["claim", "measured", "limit", ""], *(claim.row() for claim in claims)]
    reading = f"Broken: {', '.join(broken)}." if broken else "Every claim holds."
    write_record(
        f"faults_{what}", question, f"python benchmarks/faults/{what}.py", chosen,
        {claim.what: [claim.measured, claim.limit] for claim in claims}, table, reading,
    )  # fmt: skip
    return 1 if broken else 0
