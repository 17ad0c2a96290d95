"""What a chat request says about tools: checked, and as the form that an answer is bound to.

Refused, with the place: tools that are no functions, names that are doubled or could not be written
safely, schemas that are no JSON Schema, choices of tools that are not there, results without calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ernie.chat.calls import CALL, END_CALL
from ernie.tokenizer import Tokenizer
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams, SamplingParams

MAX_TOOLS = 128
MAX_DEPTH = 64  # of a schema
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
# How JSON is written between the tags: as in the training data, and never with blanks without end.
_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords of JSON Schema by what they hold.
_SCHEMAS = (
    "items",
    "additionalProperties",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
)
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how they may be used."""

    tools: tuple[dict[str, Any], ...]  # none if they may not be called
    mode: str = "auto"  # or required: at least one call
    parallel: bool = True

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def is_held(self) -> bool:
        """Whether a grammar holds each call to its form."""
        is_strict = any(tool["function"].get("strict") for tool in self.tools)
        return self.mode == "required" or is_strict


def tool_use(tools: Any, choice: Any, parallel: bool | None) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls` of a request. Raises RequestError.

    A named function leaves the others out of the constraint, but all stay in the prompt.
    """
    checked = tuple(_checked_tools(tools or []))
    mode = "auto" if choice is None else choice
    if isinstance(mode, Mapping):
        _check_named(mode, checked)
        mode = "required"
    if mode not in ("none", "auto", "required"):
        raise RequestError(
            f"tool_choice={str(choice)[:64]!r}; it takes none, auto, required or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if mode == "required" and not checked:
        raise RequestError("tool_choice asks for a call; send tools as well", param="tool_choice")
    return ToolUse(() if mode == "none" else checked, mode, parallel is not False)


def constraint_for(choice: Any, use: ToolUse, tokenizer: Tokenizer) -> GuidedDecodingParams | None:
    """The form that an answer (after its thoughts) has to have, None for any.

    Where a call is required the answer is calls and nothing else, in a grammar of llguidance's
    Lark. Where it is not, the arguments of a tool that is `strict` follow its schema once a call of
    it has begun.
    """
    if use.mode == "required":
        named = choice["function"]["name"] if isinstance(choice, Mapping) else None
        bodies = [_call_schema(t) for t in use.tools if named in (None, t["function"]["name"])]
        more = " (newlines call)*" if use.parallel and named is None else ""
        lines = (
            f"start: newlines call{more}",
            r'newlines: ("\n" "\n"?)?',
            rf'call: {_symbol(CALL, tokenizer)} "\n" body "\n" {_symbol(END_CALL, tokenizer)}',
            f"body: %json {json.dumps({'anyOf': bodies, 'x-guidance': _AS_TRAINED})}",
        )
        return GuidedDecodingParams(grammar="\n".join(lines))
    if not use.is_held:
        return None
    structures = [
        {
            "begin": f'{CALL}\n{{"name": {json.dumps(name)}, "arguments": ',
            "schema": _arguments(tool) if tool["function"].get("strict") else {"type": "object"},
            "end": f"}}\n{END_CALL}",
        }
        for name, tool in zip(use.names, use.tools)
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": [CALL]}
    return GuidedDecodingParams(structural_tag=json.dumps(tag))


def constrained(
    params: SamplingParams, choice: Any, use: ToolUse, tokenizer: Tokenizer
) -> SamplingParams:
    """`params` bound to what the choice of tools asks for. Raises RequestError."""
    constraint = constraint_for(choice, use, tokenizer)
    if constraint is None:
        return params
    what = "tool_choice=required" if use.mode == "required" else "a strict tool"
    if params.guided_decoding is not None:
        raise RequestError(
            f"{what} and another form of the answer are asked for; leave out one of the two",
            param="tool_choice",
        )
    return replace(params, guided_decoding=constraint)


def check_history(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse results of tools (role `tool`) that answer no call before them."""
    called = False
    ids: set[Any] = set()
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue  # the template refuses it by its place
        calls = message.get("tool_calls")
        if message.get("role") == "assistant":
            calls = calls if isinstance(calls, list) else []
            called = bool(calls)
            ids = {c.get("id") for c in calls if isinstance(c, Mapping)}
        elif message.get("role") == "tool":
            answers = message.get("tool_call_id")
            if not called:
                raise RequestError(
                    f"messages[{i}] is the result of a tool, but no assistant message with "
                    "tool_calls stands before it",
                    param="messages",
                )
            if answers is not None and ids - {None} and answers not in ids:
                raise RequestError(
                    f"messages[{i}].tool_call_id is {str(answers)[:64]!r}, which is not an id of "
                    "the tool_calls before it",
                    param="messages",
                )
        else:
            called = False


def _symbol(tag: str, tokenizer: Tokenizer) -> str:
    """A tag in a grammar: its token where it has one of its own, which no text may spell."""
    token = tokenizer.id_of(tag)
    return json.dumps(tag) if token is None else f"<[{token}]>"


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of the object between the tags."""
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool["function"]["name"]},
            "arguments": _arguments(tool),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _arguments(tool: Mapping[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object"}


def _check_named(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise RequestError(
            'tool_choice is an object; it takes {"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in [tool["function"]["name"] for tool in tools]:
        raise RequestError(
            f"tool_choice names {name[:64]!r}, which is not among the tools", param="tool_choice"
        )


def _checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(
            f"{len(tools)} tools are too many; send up to {MAX_TOOLS}", param="tools"
        )
    names: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            _refuse(where, 'is no function; write {"type": "function", "function": {...}}')
        function = tool.get("function")
        if not isinstance(function, dict):
            _refuse(where, "has no object `function`")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            _refuse(
                f"{where}.function.name",
                f"is {str(name)[:80]!r}; it takes 1 to 64 letters, digits, _ . or -",
            )
        if name in names:
            _refuse(where, f"has the name {name!r}, as another tool has; names are used once")
        names.add(name)
        if not isinstance(function.get("description"), (str, type(None))):
            _refuse(f"{where}.function.description", "is not a text")
        if not isinstance(function.get("strict"), (bool, type(None))):
            _refuse(f"{where}.function.strict", "takes true or false")
        _check_parameters(f"{where}.function.parameters", function.get("parameters"))
    return list(tools)


def _check_parameters(where: str, schema: Any) -> None:
    if schema is None or schema == {}:
        return
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        _refuse(where, 'must be a JSON Schema of "type": "object"')
    _check_schema(where, schema, 0)


def _check_schema(where: str, schema: Any, depth: int) -> None:
    """Refuse what no validator would take; what the keywords mean is not looked at."""
    if isinstance(schema, bool) and depth:
        return
    if not isinstance(schema, dict):
        _refuse(where, "is no JSON Schema; it takes an object")
    if depth > MAX_DEPTH:
        _refuse(where, f"is nested more than {MAX_DEPTH} deep")
    types = schema.get("type", [])
    for kind in types if isinstance(types, list) else [types]:
        if not isinstance(kind, str) or kind not in TYPES:
            _refuse(f"{where}.type", f"is {str(kind)[:64]!r}; it takes {', '.join(sorted(TYPES))}")
    names = schema.get("required", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse(f"{where}.required", "takes a list of names")
    if not isinstance(schema.get("enum", []), list):
        _refuse(f"{where}.enum", "takes a list of values")
    for key in _SCHEMAS:
        if key in schema:
            _check_schema(f"{where}.{key}", schema[key], depth + 1)
    for key in _LISTS_OF_SCHEMAS:
        if not isinstance(schema.get(key, []), list):
            _refuse(f"{where}.{key}", "takes a list of schemas")
        for n, inner in enumerate(schema.get(key, [])):
            _check_schema(f"{where}.{key}[{n}]", inner, depth + 1)
    for key in _MAPS_OF_SCHEMAS:
        if not isinstance(schema.get(key, {}), dict):
            _refuse(f"{where}.{key}", "takes an object of schemas")
        for name, inner in schema.get(key, {}).items():
            _check_schema(f"{where}.{key}.{name[:64]}", inner, depth + 1)


def _refuse(where: str, what: str) -> NoReturn:
    """`where` is cut: it may hold the names of a deep schema."""
    shown = where if len(where) <= 120 else f"{where[:60]}...{where[-57:]}"
    raise RequestError(f"{shown} {what}", param="tools")
