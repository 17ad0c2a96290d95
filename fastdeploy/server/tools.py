"""What a chat request says about tools: checked, and as the form that an answer is bound to.

Refused, with the place: tools that are no functions, names that are doubled or could not be written
safely, schemas that are no JSON Schema, choices of tools that are not there, results without calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ernie.chat.calls import CALL, END_CALL
from ernie.tokenizer import Tokenizer
from fastdeploy.engine.grammar import checked_tags, expansion_of
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams

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
    named: str | None = None  # the only one that may be called

    def arguments(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """The schema that its arguments are held to where a grammar holds calls."""
        function = tool["function"]
        is_free = self.mode != "required" and not function.get("strict")
        return {"type": "object"} if is_free else function.get("parameters") or {"type": "object"}


def tool_use(tools: Any, choice: Any, parallel: bool | None) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls` of a request. Raises RequestError.

    A named function leaves the others out of the constraint, but all stay in the prompt.
    """
    checked = tuple(_checked_tools(tools or []))
    mode, named = "auto" if choice is None else choice, None
    if isinstance(mode, Mapping):
        named = _named(mode, checked)
        mode = "required"
    if mode not in ("none", "auto", "required"):
        raise RequestError(
            f"tool_choice={str(choice)[:64]!r}; it takes none, auto, required or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if mode == "required" and not checked:
        raise RequestError("tool_choice asks for a call; send tools as well", param="tool_choice")
    return ToolUse(() if mode == "none" else checked, mode, parallel is not False, named)


def constraint_for(
    use: ToolUse,
    form: GuidedDecodingParams | None,
    tokenizer: Tokenizer,
    *,
    follows_thought: bool = False,
    any_whitespace: bool = True,
) -> GuidedDecodingParams | None:
    """The form that an answer (after its thoughts) has to have, None for any.

    `form` is what an answer has to have that calls nothing: where a call is required there is no
    such answer. Where it is not, an answer is of that form or all calls; without one, or where it
    leaves room for text, calls are tags in a text. The arguments of a tool that is `strict` follow
    its schema. Raises RequestError for a form that leaves no room for calls.

    `follows_thought`: newlines may stand before the answer. `any_whitespace`: see `Grammars`.
    """
    is_strict = any(tool["function"].get("strict") for tool in use.tools)
    if not use.tools or (use.mode == "auto" and not is_strict and form is None):
        return form
    if use.mode == "required":
        if form is not None:
            raise RequestError(
                "tool_choice=required and another form of the answer are asked for; leave out one "
                "of the two",
                param="tool_choice",
            )
        return _lark(use, f"newlines {_calls(use)}", tokenizer)
    if form is None or form.kind == "structural_tag":
        return _tags(use, form)
    if form.kind == "grammar":
        raise RequestError(
            "a grammar for the whole answer has no room for calls of tools; leave out tools, or "
            "send tool_choice=none",
            param="tool_choice",
        )
    rule = f"form: {expansion_of(form, any_whitespace=any_whitespace)}"
    lead = "newlines " if follows_thought else ""
    return _lark(use, f"{lead}(form | {_calls(use)})", tokenizer, rule)


def _lark(use: ToolUse, start: str, tokenizer: Tokenizer, *rules: str) -> GuidedDecodingParams:
    """A grammar in llguidance's Lark whose `start` may speak of `newlines` and a `call`."""
    names = {use.named} if use.named else {tool["function"]["name"] for tool in use.tools}
    bodies = [_call_schema(t, use) for t in use.tools if t["function"]["name"] in names]
    lines = (
        f"start: {start}",
        r'newlines: ("\n" "\n"?)?',
        rf'call: {_symbol(CALL, tokenizer)} "\n" body "\n" {_symbol(END_CALL, tokenizer)}',
        f"body: %json {json.dumps({'anyOf': bodies, 'x-guidance': _AS_TRAINED})}",
        *rules,
    )
    return GuidedDecodingParams(grammar="\n".join(lines))


def _calls(use: ToolUse) -> str:
    """One call, or several; as in the training data, newlines may stand behind the last."""
    return "call (newlines call)* newlines" if use.parallel and use.named is None else "call"


def _tags(use: ToolUse, form: GuidedDecodingParams | None) -> GuidedDecodingParams:
    """A text in which calls are tags, beside those of `form`."""
    structures = [
        {
            "begin": f'{CALL}\n{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ',
            "schema": use.arguments(tool),
            "end": f"}}\n{END_CALL}",
        }
        for tool in use.tools
    ]
    tag: dict[str, Any] = {"type": "structural_tag", "structures": [], "triggers": []}
    if form is not None:
        tag = checked_tags(form)
    tag |= {
        "structures": [*tag["structures"], *structures],
        "triggers": [*tag["triggers"], CALL],
    }
    return GuidedDecodingParams(structural_tag=tag)


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
            names = [call.get("id") for call in calls if isinstance(call, Mapping)]
            if not all(isinstance(name, str | None) for name in names):
                raise RequestError(
                    f"messages[{i}].tool_calls has an id that is no string", param="messages"
                )
            ids = {*names}
        elif message.get("role") == "tool":
            answers = message.get("tool_call_id")
            if not isinstance(answers, str | None):
                raise RequestError(f"messages[{i}].tool_call_id is no string", param="messages")
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


def _call_schema(tool: Mapping[str, Any], use: ToolUse) -> dict[str, Any]:
    """JSON Schema of the object between the tags."""
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool["function"]["name"]},
            "arguments": use.arguments(tool),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _named(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
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
    return name


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
