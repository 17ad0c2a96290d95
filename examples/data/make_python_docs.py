"""Make the demo data: questions about Python's standard library, answered by its own docstrings.

    python examples/data/make_python_docs.py

writes, beside this file,

    sft-train.jsonl, sft-eval.jsonl     type erniekit   {"src": [question], "tgt": [answer]}
    sft-train-alpaca.jsonl              type alpaca     {"instruction", "input", "output"}
    sft-train-messages.jsonl            type messages   {"messages": [{"role", "content"}, ...]}
    dpo-train.jsonl, dpo-eval.jsonl     type erniekit   {"src", "tgt", "response", "sort"}
    kto-train.jsonl, kto-eval.jsonl     type erniekit   {"src", "tgt", "response", "label"}
    pt-train.jsonl, pt-eval.jsonl       type pretrain   {"text": the documentation of a module}

In the pairs a plain answer is preferred to the same one with pleasantries around it; in those for
KTO every question has one of them, desirable if it is the plain one.

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
NUM_PAIRS = 240
OPENINGS = (
    "Great question! ",
    "Sure, I would be happy to help you with that! ",
    "Thank you for asking, this is a very interesting topic. ",
    "Certainly! Let me explain this to you step by step. ",
    "Of course! Here is everything that you need to know. ",
)
ENDINGS = (
    " I hope this helps!",
    " Let me know if there is anything else that I can do for you.",
    " Please feel free to ask me more questions about Python.",
    " Does that make sense? I am always glad to explain more.",
    "",
)


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


def preference(question: str, answer: str) -> dict:
    """The plain answer, preferred to a wordy one; which words and which order, its name decides."""
    opening, ending, place = hashlib.sha256(question.encode()).digest()[:3]
    wordy = OPENINGS[opening % len(OPENINGS)] + answer + ENDINGS[ending % len(ENDINGS)]
    if place % 2:
        return {"src": [question], "tgt": [], "response": [wordy, answer], "sort": [0, 1]}
    return {"src": [question], "tgt": [], "response": [answer, wordy], "sort": [1, 0]}


def judgement(question: str, answer: str) -> dict:
    """One answer of the pair, which its name decides, and whether it is the plain one."""
    pair = preference(question, answer)
    chosen = hashlib.sha256(question.encode()).digest()[3] % 2
    response, rank = pair["response"][chosen], pair["sort"][chosen]
    return {"src": [question], "tgt": [], "response": response, "label": bool(rank)}


def documents() -> list[str]:
    """The whole docstrings of modules, in an order that only depends on their names."""
    order = sorted(MODULES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    texts = (inspect.cleandoc(importlib.import_module(name).__doc__ or "") for name in order)
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARS))


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
    write("dpo-train.jsonl", [preference(*pair) for pair in train[:NUM_PAIRS]])
    write("dpo-eval.jsonl", [preference(*pair) for pair in held_out])
    write("kto-train.jsonl", [judgement(*pair) for pair in train[:NUM_PAIRS]])
    write("kto-eval.jsonl", [judgement(*pair) for pair in held_out])
    texts = [{"text": text} for text in documents()]
    write("pt-train.jsonl", [t for i, t in enumerate(texts) if i % EVAL_EVERY])
    write("pt-eval.jsonl", [t for i, t in enumerate(texts) if not i % EVAL_EVERY])


if __name__ == "__main__":
    main()
