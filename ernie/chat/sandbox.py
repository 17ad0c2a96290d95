"""Jinja chat templates from model folders, compiled and rendered in a sandbox.

A template is code that came with a model. It runs in jinja2's immutable sandbox, may not include
files or name underscore attributes (both refused when it is loaded), and each rendering is bounded
in time and in output. Not bounded: the memory of a single expression, such as a string padded to a
given width.

Message content must not be able to write control tokens into the rendered text, while the template
may look at it and change it (`strip`, `split`, `in`). So the characters that control tokens begin
with are replaced in the content by stand-ins before rendering, one private character each, and put
back afterwards as untrusted text: ordinary content passes unchanged, and no spelling of a control
token survives, however the template cuts and joins. The limit: a template that computes with those
characters themselves (say, finds `<` in a user's text) sees the stand-in, and one that assembles a
control token from its own half and a piece of content without its first character (`'<' + name`) is
trusted to mean it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ernie.chat.messages import ChatError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 24

# Stand-ins are drawn from supplementary private use plane A, which ordinary text does not contain.
_STAND_INS = range(0xF0000, 0xFFFFE)
LEADING_THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
# What an expression of a template can raise on messages its author did not think of.
_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_deadline: ContextVar[float] = ContextVar("deadline")


class JinjaTemplate:
    """One compiled template; `where` names it in errors, `constants` are `bos_token` and so on.

    `variables` are the names it reads and does not set itself.
    """

    def __init__(self, source: str, where: str, constants: Mapping[str, str]):
        self._where = where
        self._constants = dict(constants)
        self._template, self.variables = _compiled(source, where)

    def text(self, variables: Mapping[str, Any]) -> str:
        """The rendered text. Raises ChatError with the template's own words where it objects."""
        pieces, size = [], 0
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            for piece in self._template.generate(self._constants | dict(variables)):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise ChatError(f"{self._where} wrote more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise ChatError(f"{self._where} refused the messages: {error}") from None
        except ChatError:
            raise
        except _TEMPLATE_FAULTS as error:
            raise ChatError(f"{self._where} fails on these messages: {error!r}") from None
        finally:
            _deadline.reset(token)
        return "".join(pieces)


class StandIns:
    """A reversible disguise for the characters that control tokens begin with.

    The stand-ins are characters that occur nowhere in `values`, so putting them back is exact.
    """

    def __init__(self, control_tokens: Iterable[str], values: Any):
        first = sorted({token[0] for token in control_tokens})
        used = {ord(c) for text in _strings(values) for c in text if ord(c) >= 0xF0000}
        free = (code for code in _STAND_INS if code not in used)
        self._hide = {ord(c): next(free) for c in first}
        self._show = {stand_in: c for c, stand_in in self._hide.items()}
        self.characters = frozenset(map(chr, self._show))

    def hide(self, value: Any) -> Any:
        """`value` with every string in it disguised, keys of objects too."""
        if isinstance(value, str):
            return value.translate(self._hide)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A disguised message. The tags of a thought which opens an answer stay: templates look for
        them.
        """
        hidden = self.hide(message) | {"role": message["role"]}
        thought = message["role"] == "assistant" and LEADING_THOUGHT.fullmatch(message["content"])
        if thought:
            opening, inner, closing, rest = thought.groups()
            hidden["content"] = opening + self.hide(inner) + closing + self.hide(rest)
        return hidden

    def show(self, text: str) -> str:
        return text.translate(self._show)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with a clock: every call and every turn of a loop looks at it."""

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _look_at_clock()
        return super().call(context, function, *args, **kwargs)

    def ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            _look_at_clock()
            yield item


def _look_at_clock() -> None:
    if time.monotonic() > _deadline.get():
        raise jinja2.TemplateRuntimeError(f"it ran for more than {MAX_SECONDS:g} s")


class _Generation(Extension):
    """`{% generation %}` marks what the model writes; rendering passes over it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> _Sandbox:
    """The names and settings that transformers gives templates, which is what authors write
    against.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, escapes no HTML. Stand-ins are never escaped, or they could not be put
    back.
    """
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not ensure_ascii:
        return text
    keep = (c.isascii() or ord(c) in _STAND_INS for c in text)
    return "".join(c if kept else json.dumps(c)[1:-1] for c, kept in zip(text, keep))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _compiled(source: str, where: str) -> tuple[jinja2.Template, frozenset[str]]:
    environment = _environment()
    try:
        tree = environment.parse(source)
        _refuse_reaching_out(tree, where)
        variables = frozenset(meta.find_undeclared_variables(tree))
        for loop in tree.find_all(nodes.For):
            ticking = nodes.EnvironmentAttribute("ticking")
            loop.iter = nodes.Call(ticking, [loop.iter], [], None, None, lineno=loop.lineno)
        code = environment.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"{where}, line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise ChatError(f"{where} is nested too deeply to compile") from None
    template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    return template, variables


def _refuse_reaching_out(tree: nodes.Template, where: str) -> None:
    for reader in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise ChatError(f"{where}, line {reader.lineno}: a chat template may not read other files")
    attribute: Any
    for attribute in tree.find_all((nodes.Getattr, nodes.NSRef)):
        if attribute.attr.startswith("_"):
            raise ChatError(
                f"{where}, line {attribute.lineno}: a chat template may not use the attribute "
                f"{attribute.attr!r}, which begins with an underscore"
            )
