"""Settings: frozen dataclasses whose fields carry their own help, filled strictly from flat
key=value sources.

A YAML file, command-line overrides and command-line flags all end in the same place: a flat dict of
keys, distributed over one or several dataclasses by field name. What does not fit is an error that
names the key, the value, its origin, and what would be right; nothing is dropped. Help texts, flags
and documentation tables are made from the same fields, so there is no second list of options.

Imports nothing but the standard library and PyYAML (within `read_yaml`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that a user gave is wrong: one sentence with the key, the value and what would be
    right.
    """


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: float | None = None,
    group: str = "",
    aliases: Sequence[str] = (),
    path: bool = False,
) -> Any:
    """A dataclass field with its default and its help text. `choices` limits the values. A number
    is `least` to `most`, or `above` and `below` others; `also` is one more that it may be.
    `check_bounds` reads these.

    `group` is the heading that help texts put over this field and those after it; `aliases` are
    other names of its flag, with a `!` before one that means the opposite. Of a `path`, or a list
    of them, `~` at the front is the user's folder.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "least": least,
        "most": most,
        "above": above,
        "below": below,
        "also": also,
        "group": group,
        "aliases": tuple(aliases),
        "path": path,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, group: str = "", path: bool = False) -> Any:
    """A dataclass field that has no default."""
    return dataclasses.field(metadata={"help": help, "choices": (), "group": group, "path": path})


def fill(kinds: Sequence[type], values: Mapping[str, Any], origin: str) -> list[Any]:
    """One instance of each dataclass in `kinds`, each taking its own keys out of `values`.

    Raises ConfigError for an unknown key (with the nearest known one), a value of the wrong type,
    or a missing required key. `origin` names the source of the values in messages.
    """
    types_by_key = {name: hint for kind in kinds for name, hint in field_types(kind).items()}
    for key in values:
        if key not in types_by_key:
            raise ConfigError(f"unknown key {key!r} in {origin}{did_you_mean(key, types_by_key)}")
    instances = []
    for kind in kinds:
        fields = dataclasses.fields(kind)
        given = {
            f.name: _read(values[f.name], types_by_key[f.name], f)
            for f in fields
            if f.name in values
        }
        for f in fields:
            no_default = f.default is f.default_factory is dataclasses.MISSING
            if no_default and f.name not in given:
                raise ConfigError(
                    f"{f.name} is not set in {origin}; give {f.name}: ... ({help_of(f)})"
                )
        instances.append(kind(**given))
    return instances


def _read(value: Any, hint: Any, f: dataclasses.Field) -> Any:
    found = coerce(value, hint, f.name, f.metadata.get("choices", ()))
    if not f.metadata.get("path"):
        return found
    if isinstance(found, (list, tuple)):
        return type(found)(map(os.path.expanduser, found))
    return os.path.expanduser(found) if isinstance(found, str) else found


def check_bounds(settings: Any) -> None:
    """Raise `ConfigError` unless every number of a dataclass is finite and in its field's range.

    None passes, and of a tuple each number counts. A field whose default is infinite may be so.
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check_number(number, f)


def _check_number(value: float, f: dataclasses.Field) -> None:
    least, most, above, below, also = (
        f.metadata.get(name) for name in ("least", "most", "above", "below", "also")
    )
    if value == also or (value == f.default and math.isinf(value)):
        return
    if not math.isfinite(value):
        wrong = "not finite"
    elif (least is not None and value < least) or (above is not None and value <= above):
        wrong = "too small"
    elif (most is not None and value > most) or (below is not None and value >= below):
        wrong = "too large"
    else:
        return
    told = f"{value:g}" if isinstance(value, float) else value
    raise ConfigError(f"{f.name}={told} is {wrong}; give {range_of(f) or 'a number'}")


def range_of(f: dataclasses.Field) -> str:
    """The numbers that a field takes, in words: `1 or more, or -1`; empty where all are."""
    low, high = f.metadata.get("least"), f.metadata.get("most")
    above, below = f.metadata.get("above"), f.metadata.get("below")
    if high is None and below is None:
        words = [f"{low} or more"] * (low is not None) + [f"more than {above}"] * (
            above is not None
        )
    else:
        words = [f"more than {above}" if low is None else f"{low}"]
        words.append(f"to {high}" if below is None else f"to below {below}")
    also = f.metadata.get("also")
    return " ".join(words) + (f", or {also}" if also is not None else "")


def field_types(kind: type) -> dict[str, Any]:
    """Resolved type of every field of a dataclass, by name."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def help_of(field: dataclasses.Field) -> str:
    return field.metadata.get("help", "")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known key is near."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def listed(names: Iterable[str], word: str = "or") -> str:
    """Names in a sentence: `a`, `a or b`, `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def coerce(value: Any, hint: Any, key: str, choices: Sequence[Any] = ()) -> Any:
    """`value` as the type of the field: YAML's and the command line's spellings are understood.

    "1e-5" is a float, "true"/"1" a bool, "a,b" a list of two; None only where the type allows it.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
        else:
            return _first_fitting(value, [a for a in args if a is not type(None)], key, choices)
        raise _mismatch(key, value, hint)
    if origin is Literal:
        return coerce(value, type(args[0]), key, args)
    if origin in (list, tuple):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return origin(coerce(v.strip() if isinstance(v, str) else v, args[0], key) for v in items)
    result = _scalar(value, hint, key)
    if choices and result not in choices:
        allowed = ", ".join(map(str, choices))
        raise ConfigError(f"{key}={value!r} is not known; use one of {allowed}")
    return result


def _first_fitting(value: Any, hints: Sequence[Any], key: str, choices: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return coerce(value, hint, key, choices)
        except ConfigError:
            if hint is hints[-1]:
                raise
    raise AssertionError("a union has at least one member")


def _scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise _mismatch(key, value, hint) from None
        if math.isnan(number):
            raise ConfigError(f"{key}={value} is not a number; give one")
        if hint is float:
            return number
        if hint is int and math.isfinite(number) and number == int(number):
            return (
                int(value)
                if isinstance(value, (int, str)) and str(value).lstrip("-").isdigit()
                else int(number)
            )
    elif hint is str and "\0" in str(value):
        raise ConfigError(f"{key}={value!r} holds a NUL character; leave it out")
    elif hint is str and isinstance(value, (str, int, float)):
        return str(value)
    elif hint is dict and isinstance(value, dict):
        return value
    elif hint is dict and isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            return parsed
        raise ConfigError(f"{key}={value!r} is no JSON object; write it as {{...}}")
    raise _mismatch(key, value, hint)


_TAKEN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "an object",
}


def _mismatch(key: str, value: Any, hint: Any) -> ConfigError:
    wanted = _TAKEN.get(hint, getattr(hint, "__name__", str(hint)))
    return ConfigError(f"{key}={value!r} is not {wanted}; give one")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The flat mapping in a YAML (or JSON) file.

    Raises ConfigError with line and column for bad syntax, duplicate keys, aliases (which can blow
    a small file up to gigabytes) and Python tags; nothing in a file is ever executed.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise ConfigError(f"{_place(mark)}: YAML aliases are refused; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            seen: set[str] = set()
            for key_node, _ in node.value:
                place = _place(key_node.start_mark)
                if key_node.tag != "tag:yaml.org,2002:str":
                    given = key_node.value if isinstance(key_node.value, str) else "a list or map"
                    raise ConfigError(
                        f"{place}: {given} is not a key; give a name, or put it in quotes"
                    )
                if key_node.value in seen:
                    raise ConfigError(f"{place}: key {key_node.value!r} is given twice; keep one")
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    def _place(mark: Any) -> str:
        return f"{path}, line {mark.line + 1}, column {mark.column + 1}"

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.load(text, Loader=Strict)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "bad syntax"
        raise ConfigError(
            f"{_place(error.problem_mark or error.context_mark)}: {problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        number = f"U+{ord(text[error.position]):04X}"
        raise ConfigError(
            f"{path}, line {line}, column {column}: the character {number} is not allowed; leave "
            "it out"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply; write it flat") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}; it must hold `key: value` lines"
        )
    return values


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b=x"]` as a dict; values stay text, `coerce` gives them their field's type."""
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{word!r} is not an override; write key=value, without dashes or spaces"
            )
        values[key] = value
    return values


def as_word(value: Any) -> str:
    """A value as `key=value` and `read_overrides` take it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_flags(parser: Any, kind: type) -> None:
    """Give an `argparse` parser one `--flag` per field of a dataclass; underscores become dashes.

    A flag that is not on the command line leaves no attribute, so that `vars(namespace)` holds only
    what the user said and `fill` can do the rest. Both spellings (`--max-model-len`,
    `--max_model_len`) work.
    """
    import argparse

    hints = field_types(kind)
    group = parser.add_argument_group(kind.__name__, (kind.__doc__ or "").strip().split("\n")[0])
    for f in dataclasses.fields(kind):
        names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        text = f"{help_of(f)} [{_default_text(f)}]".replace("%", "%%")
        extra: dict[str, Any] = {"metavar": f.name.upper().rsplit("_", 1)[-1]}
        if hints[f.name] is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=text, **extra)


def _default_text(f: dataclasses.Field) -> str:
    if f.default is not dataclasses.MISSING:
        return "default: " + ("none" if f.default is None else str(f.default))
    if f.default_factory is not dataclasses.MISSING:
        return f"default: {f.default_factory()}"
    return "required"


def describe(kind: type) -> str:
    """A text table of a dataclass: one `key: default - help` line per field, for `--help` and the
    docs.
    """
    rows = [
        (f.name, _default_text(f).removeprefix("default: "), f) for f in dataclasses.fields(kind)
    ]
    lines = []
    for name, default, f in rows:
        choices = f.metadata.get("choices") or ()
        among = f" One of: {', '.join(map(str, choices))}." if choices else ""
        lines.append(f"  {name + ': ' + default:<42} {help_of(f)}{among}")
    return "\n".join(lines)
