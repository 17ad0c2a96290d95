"""What the small JSON files beside a vocabulary say about special tokens; the control tokens.

A *special* token is not shown to people. A *control* token is one that plain text must never
produce: the special ones, and the tags by which the chat templates mark thoughts and tool calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie.json_files import read_object

# Tags the templates of the family write. Files often mark them as ordinary (so that decoding shows
# them), yet a user who types one must not open or close a thought or a tool call.
_STRUCTURE = frozenset(
    f"<{slash}{name}>"
    for slash in ("", "/")
    for name in (
        "think",
        "response",
        "tool_call",
        "tool_response",
        "tool_output",
        "tool_list",
        "system_setting",
        "global_setting",
    )
)
_PIPED = re.compile(r"<\|[^|<>]+\|>")


class TokenizerError(ValueError):
    """Tokenizer files that are missing, broken or contradictory, or text that is not Unicode."""


@dataclass
class Declared:
    """What the small JSON files beside the vocabulary say about special tokens."""

    names: dict[str, str] = field(default_factory=dict)  # "eos_token" -> "</s>"
    source: dict[str, str] = field(default_factory=dict)  # name -> the file that says so
    special: set[str] = field(default_factory=set)
    ordinary: set[str] = field(default_factory=set)  # added, and marked as not special
    ids: dict[str, int] = field(default_factory=dict)
    strips_left: set[str] = field(default_factory=set)
    strips_right: set[str] = field(default_factory=set)
    add_prefix_space: bool | None = None
    eos_ids: frozenset[int] = frozenset()

    @classmethod
    def read(cls, folder: Path) -> Declared:
        """tokenizer_config.json wins over special_tokens_map.json, which is the older way."""
        declared = cls()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            declared._take_special(read_object(folder / name, TokenizerError), name)
        for token, i in read_object(folder / "added_tokens.json", TokenizerError).items():
            declared._take_id(token, i, folder / "added_tokens.json")
        config_path = folder / "tokenizer_config.json"
        config = read_object(config_path, TokenizerError)
        for key, entry in config.get("added_tokens_decoder", {}).items():
            declared._take_id(entry["content"], int(key), config_path)
            declared.take_flags(entry)
        prefix = config.get("add_prefix_space")
        declared.add_prefix_space = prefix if isinstance(prefix, bool) else None
        declared.eos_ids = _generation_eos_ids(folder / "generation_config.json")
        return declared

    def take_flags(self, entry: dict[str, Any]) -> None:
        token = entry["content"]
        (self.special if entry.get("special") else self.ordinary).add(token)
        if entry.get("lstrip"):
            self.strips_left.add(token)
        if entry.get("rstrip"):
            self.strips_right.add(token)

    def _take_special(self, config: dict[str, Any], file: str) -> None:
        for key, value in config.items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                values = value.values() if isinstance(value, dict) else value or ()
                self.special.update(map(_content, values))
            elif key.endswith("_token") and isinstance(value, (str, dict)):
                self.names.setdefault(key, _content(value))
                self.source.setdefault(key, file)
                self.special.add(_content(value))

    def _take_id(self, token: str, i: Any, path: Path) -> None:
        if not isinstance(i, int) or i < 0:
            raise TokenizerError(
                f"{path}: token {token!r} has the id {i!r}; expected a number from 0"
            )
        if self.ids.setdefault(token, i) != i:
            raise TokenizerError(f"{path}: token {token!r} has two ids, {self.ids[token]} and {i}")

    def is_special(self, token: str) -> bool:
        """Not shown to people: a file says so, or it is spelled `<|...|>` and no file objects."""
        if token in self.special:
            return True
        return token not in self.ordinary and bool(_PIPED.fullmatch(token))


def is_tag(token: str) -> bool:
    return token in _STRUCTURE or bool(_PIPED.fullmatch(token))


def control_pattern(control: set[str], declared: Declared) -> re.Pattern[str]:
    """Matches one control token, the longest first, with the blanks that its entry says it
    swallows.
    """
    alternatives = [
        (r"\s*" if token in declared.strips_left else "")
        + re.escape(token)
        + (r"\s*" if token in declared.strips_right else "")
        for token in sorted(control, key=len, reverse=True)
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def _content(value: str | dict[str, Any]) -> str:
    return value["content"] if isinstance(value, dict) else value


def _generation_eos_ids(path: Path) -> frozenset[int]:
    value = read_object(path, TokenizerError).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in values):
        raise TokenizerError(f"{path}: eos_token_id is {value!r}; expected an id or a list of ids")
    return frozenset(values)
