"""`fastdeploy tokenizer` and `fastdeploy collect-env`: what a model's tokenizer does to a text, and
what this machine has, for a report of a problem.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ernie.host import memory_bytes
from ernie.settings import ConfigError, option, required
from fastdeploy.client.command import read

PACKAGES = (
    "ernie-open", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "triton",
    "fastapi", "uvicorn", "pydantic", "prometheus-client", "openai",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizing:
    """A text to ids, or ids to a text."""

    model: str = required("Folder of the model or of its tokenizer.")
    encode: str | None = option(None, "Text to encode; - reads it from the standard input.")
    decode: str | None = option(None, "Ids to decode, separated by commas.")
    vocab_size: bool = option(False, "Only say how many entries there are.")


def tokenizer(argv: Sequence[str]) -> int:
    (given,) = read(argv, [Tokenizing], "fastdeploy tokenizer", "A text to ids, or back.")
    if sum((given.encode is not None, given.decode is not None, given.vocab_size)) != 1:
        raise ConfigError("give one of encode, decode and vocab_size")
    from ernie.tokenizer import Tokenizer

    loaded = Tokenizer.from_folder(given.model)
    if given.vocab_size:
        sys.stdout.write(f"{loaded.vocab_size}\n")
    elif given.decode is not None:
        words = given.decode.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise ConfigError(f"decode={given.decode!r} is not a list of ids; write 1,2,3")
        ids = [int(word) for word in words]
        if max(ids) >= loaded.vocab_size:
            raise ConfigError(f"{max(ids)} is beyond the {loaded.vocab_size} entries there are")
        sys.stdout.write(loaded.decode(ids) + "\n")
    else:
        text = sys.stdin.read() if given.encode == "-" else given.encode
        ids = loaded.encode(text)
        for token in ids:
            piece = loaded.join_bytes([token]).decode(errors="backslashreplace")
            sys.stdout.write(f"{token:>8}  {json.dumps(piece, ensure_ascii=False)}\n")
        sys.stdout.write(f"{len(ids)} tokens\n")
    return 0


def collect_env(argv: Sequence[str]) -> int:
    """Print versions, processor, memory and GPUs, as a report of a fault should have them."""
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write("usage: fastdeploy collect-env\n\n" + f"{collect_env.__doc__}\n")
        return 0
    if argv:
        raise ConfigError(f"collect-env takes no flags; it was given {argv[0]!r}")
    for name, value in environment().items():
        sys.stdout.write(f"{name:<20}{value}\n")
    return 0


def environment() -> dict[str, str]:
    """Versions, processor, memory and GPUs."""
    import torch

    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processors": str(os.cpu_count()),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    found |= {name: _version(name) for name in PACKAGES}
    found["cuda"] = str(torch.version.cuda or "not built in")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"gpu {i}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        )
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
