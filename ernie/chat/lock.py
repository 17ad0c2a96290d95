"""How dialogues were written when a model was trained: hashes that travel with the model.

`training_template.json` in a model folder holds two: of the chat template with the rule which
tokens are trained, and of the tokenizer. Whoever writes dialogues for the model later compares
them with what lies in the folder then (`changes`); one space is a difference. A folder without the
file, such as a published one, says nothing and is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ernie.chat.messages import ChatError
from ernie.chat.template import ChatTemplate
from ernie.tokenizer import Tokenizer

LOCK_FILE = "training_template.json"
# Says which tokens of a rendered dialogue get labels; to be changed with the rule, see the test.
MASK_RULE = "answers, each with its end token; eos in place of <|end_of_sentence|>; 1"
_MODEL_FILES = ("tokenizer.json", "tokenizer.model")
_WHAT = {"template": "chat template", "tokenizer": "tokenizer"}


def template_hash(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits that change with any character of a template's text, with the special
    tokens it is given, and with the rule of the mask.
    """
    source = template.source or _written(template)
    return _digest(source, tokenizer.names, MASK_RULE)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits that change with the files of the vocabulary and its control tokens."""
    files = [path for path in tokenizer.files if path.name in _MODEL_FILES]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return _digest(tokenizer.fingerprint, sums)


def _written(template: ChatTemplate) -> list[Any]:
    """What a built-in template, which has no text, makes of some dialogues; None for those that it
    refuses.
    """
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    told: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "label": 0},
        {"role": "user", "content": "q"},
    ]
    called: list[dict[str, Any]] = [
        *told[1:2],
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "content": "t"},
    ]
    if template.reads:
        pictures = [{"type": kind} for kind in sorted(template.reads)]
        told.append({"role": "user", "content": [{"type": "text", "text": "q"}, *pictures]})
    answer = {"role": "assistant", "content": "a", "reasoning_content": ""}
    found: list[Any] = []
    for messages, extra in (
        ([*told, answer], {"add_generation_prompt": False}),
        (told, {}),
        ([*called, answer], {"add_generation_prompt": False, "tools": tools}),
    ):
        try:
            parts = template.render(messages, **extra)
            found.append([astuple(p) if p.picture else astuple(p)[:4] for p in parts])
        except ChatError:
            found.append(None)
    return found


def _digest(*values: Any) -> str:
    text = json.dumps(values, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_lock(folder: str | Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Write `training_template.json`: what a model in this folder is being trained with."""
    values = {
        "template": template_hash(template, tokenizer),
        "tokenizer": tokenizer_hash(tokenizer),
        "mask_rule": MASK_RULE,
    }
    path = Path(folder) / LOCK_FILE
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def changes(folder: str | Path, template: ChatTemplate | None, tokenizer: Tokenizer) -> str:
    """What differs from what the model in a folder was trained with, naming both hashes; the empty
    string for nothing, and for a folder without the file.

    Raises ChatError for a file that is no such file.
    """
    path = Path(folder) / LOCK_FILE
    if not path.is_file():
        return ""
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
        trained = {what: trained[what] for what in _WHAT}
    except (ValueError, KeyError, TypeError):
        raise ChatError(f"{LOCK_FILE} is damaged; copy it again from where it came") from None
    now = {
        "template": template_hash(template, tokenizer) if template else "none",
        "tokenizer": tokenizer_hash(tokenizer),
    }
    return " and ".join(
        f"its {name} was {trained[what]} when it was trained and is {now[what]} now"
        for what, name in _WHAT.items()
        if trained[what] != now[what]
    )
