"""Make the demo data: questions about Python's standard library, answered by its own docstrings.

    python examples/data/make_python_docs.py

writes, beside this file,

    sft-train.jsonl, sft-eval.jsonl     type erniekit   {"src": [question], "tgt": [answer]}
    sft-train-alpaca.jsonl              type alpaca     {"instruction", "input", "output"}
    sft-train-messages.jsonl            type messages   {"messages": [{"role", "content"}, ...]}

The files in the repository come from CPython 3.11; another version gives slightly other ones. Every
fifteenth function is held out for evaluation; no function is in both files. The texts are the
documentation of Python (Copyright Python Software Foundation, PSF License 2; see NOTICE).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
TYPES = (str, bytes, list, dict, set, frozenset, tuple, int, float, complex, memoryview, range)
MODULES = """
builtins math cmath statistics random itertools functools operator collections string re
textwrap difflib datetime calendar time os os.path pathlib shutil glob fnmatch tempfile json csv
struct pickle copy heapq bisect array queue threading subprocess signal socket ssl select
asyncio io logging argparse inspect types typing dataclasses contextlib abc gc weakref traceback
warnings unittest.mock urllib.parse http.client email.utils html base64 binascii hashlib hmac
secrets uuid zlib gzip bz2 lzma zipfile tarfile sqlite3 decimal fractions platform locale
gettext ast dis tokenize keyword linecache timeit trace cProfile enum graphlib ipaddress
mimetypes netrc shlex sched stat sys sysconfig unicodedata xml.sax.saxutils zoneinfo codecs
colorsys concurrent.futures
""".split()  # noqa: SIM905 - a list one word a line would hide the rest
EVAL_EVERY = 15
MIN_CHARS, MAX_CHARS = 40, 420


def functions() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public functions and of the methods of basic types."""
    for kind in TYPES:
        for name, member in sorted(vars(kind).items()):
            if not name.startswith("_") and callable(member) and member.__doc__:
                yield f"{kind.__name__}.{name}", member.__doc__
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, member in sorted(vars(module).items()):
            routine = inspect.isroutine(member) and not name.startswith("_")
            # A name that a module merely imports from elsewhere is documented there.
            if routine and member.__doc__ and name in getattr(module, "__all__", [name]):
                yield f"{module_name}.{name}".removeprefix("builtins."), member.__doc__


def clean(docstring: str) -> str:
    """The docstring's opening paragraphs as running text; empty when it does not suit."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    while paragraphs and re.match(r"^[\w.]+\(.*\)", paragraphs[0]):
        paragraphs.pop(0)  # a signature line says nothing in words
    text = ""
    for paragraph in paragraphs:
        line = " ".join(paragraph.split())
        no_prose = re.search(r">>>|::|^[-=]{3}|^\* |^:param|^Args", paragraph)
        if no_prose or len(text) + len(line) > MAX_CHARS:
            break
        text = f"{text} {line}".strip()
    plain = text.isascii() and text[:1].isupper() and text.endswith((".", "!"))
    return text if plain and MIN_CHARS <= len(text) <= MAX_CHARS else ""


def samples() -> list[tuple[str, str]]:
    """(question, answer) pairs without doubles, in an order that only depends on their names."""
    answer_by_name: dict[str, str] = {}
    for name, docstring in functions():
        answer = clean(docstring)
        if answer and answer not in answer_by_name.values():
            answer_by_name.setdefault(name, answer)
    order = sorted(answer_by_name, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [(f"What does Python's `{name}` do?", answer_by_name[name]) for name in order]


def write(name: str, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (HERE / name).write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(lines)} samples")


def main() -> None:
    pairs = samples()
    train = [p for i, p in enumerate(pairs) if i % EVAL_EVERY]
    held_out = [p for i, p in enumerate(pairs) if not i % EVAL_EVERY]
    write("sft-train.jsonl", [{"src": [q], "tgt": [a]} for q, a in train])
    write("sft-eval.jsonl", [{"src": [q], "tgt": [a]} for q, a in held_out])
    write(
        "sft-train-alpaca.jsonl",
        [{"instruction": q, "input": "", "output": a} for q, a in train[:20]],
    )
    roles = ("user", "assistant")
    write(
        "sft-train-messages.jsonl",
        [{"messages": [{"role": r, "content": c} for r, c in zip(roles, p)]} for p in train[:20]],
    )


if __name__ == "__main__":
    main()
