"""Forms of answers, compiled: from `GuidedDecodingParams` to a matcher of llguidance.

    json, json_object, regex, choice, grammar, structural_tag
        -> `grammar_of`: one text in llguidance's own language (Lark, or a list of grammars in JSON)
        -> `Grammars.compile`: a matcher over the token bytes of this tokenizer, within limits
        -> `Grammars.begin`: the same in a thread, kept for the next request of the same form

A matcher is an Earley parser over lazily built automata of the token bytes: there is no
backtracking that a pattern could blow up, and what an automaton may grow to is limited. A grammar
that passes all limits and to which nothing at all can be answered is refused with the others.

What is refused: text longer than `max_bytes`, `$ref` to anything outside of the schema (nothing is
ever fetched), keywords of JSON Schema that the library would have to ignore, and look-around and
back-references in regular expressions. White space between the parts of JSON is bounded: a space,
or a line break and its indentation, so that a model cannot fill an answer with it.

Compiling costs CPU and memory before any limit of the library stops it, so the server lets a
process of its own try first (`grammar_check.py`). Imports neither torch nor, before a grammar is
compiled, llguidance: the engine runs without it and says so to the request that needs it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from fastdeploy.config import EngineConfig
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger("fastdeploy")

MAX_COMPILED = 64  # grammars kept, and the bytes of their texts together, in units of max_bytes
MAX_COMPILED_SIZES = 8
WHITESPACE = r" |\n {0,32}|\n\t{0,8}"
MAX_REASON = 300  # characters of the library's own words in an error
PREFIX = "guided decoding: "  # of errors, until a server knows the field
HEADER = re.compile(r"^\s*%llguidance\b.*$", re.MULTILINE)
TEXT = r"TEXT: /(.|\n)*/"
_IN_REGEX = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}  # what Lark's form of one cannot hold
TOO_SLOW = (
    PREFIX + "the answer's form takes more time than guided_decoding_max_stall_ms allows; write it "
    "with fewer ways to read the same text"
)

# Fuel and items bound the work of a mask as far as the library counts it (not for grammars of many
# ambiguous terminals: `constraint` has a clock for these), states the memory of one request to some
# 40 MiB; a schema of ordinary size takes hundreds of states.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Grammars:
    """Compiles forms for one tokenizer, and keeps those that were asked for last."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        *,
        max_bytes: int,
        any_whitespace: bool = True,
    ) -> None:
        """`eos_ids` end an answer where its form is complete; `vocab_size` is the model's."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_ids = sorted(eos_ids)
        assert self.eos_ids, "no token ends an answer"
        self.max_bytes = max_bytes
        self.any_whitespace = any_whitespace
        self.tokens: LLTokenizer | None = None  # takes a quarter of a second to build
        self.matchers: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        # One thread owns all of the above; llguidance lets go of Python's lock while it compiles.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def begin(self, guided: GuidedDecodingParams) -> Future[LLMatcher]:
        """A matcher at the beginning of its answer, soon; the future may hold a RequestError."""
        return self.thread.submit(self._kept, guided)

    def check_size(self, guided: GuidedDecodingParams) -> None:
        """Raise RequestError for a text that is longer than is compiled."""
        try:
            size = len(guided.text.encode())
        except UnicodeEncodeError:
            raise _refused(f"{guided.kind} has a lone surrogate; send whole characters") from None
        if size > self.max_bytes:
            raise _refused(
                f"{guided.kind} of {size} bytes is longer than guided_decoding_max_bytes="
                f"{self.max_bytes}; make it smaller"
            )

    def compile(self, guided: GuidedDecodingParams) -> LLMatcher:
        """A matcher at the beginning of its answer. Raises RequestError for what cannot be used."""
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        self.check_size(guided)
        grammar = grammar_of(guided, self.tokenizer, any_whitespace=self.any_whitespace)
        if self.tokens is None:
            self.tokens = LLTokenizer(
                _TokenBytes(self.tokenizer, self.vocab_size, self.eos_ids),  # type: ignore[arg-type]
                n_vocab=self.vocab_size,
                eos_token=self.eos_ids,
            )
        limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self.tokens, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # where nothing can be answered it is found here
        if matcher.is_error():
            raise _refused(f"{guided.kind} cannot be used: {_reason(matcher.get_error())}")
        return matcher

    def _kept(self, guided: GuidedDecodingParams) -> LLMatcher:
        key = guided.kind, guided.text
        matcher = self.matchers.get(key)
        if matcher is None:
            matcher = self.matchers[key] = self.compile(guided)
        self.matchers.move_to_end(key)
        while len(self.matchers) > MAX_COMPILED or self._num_characters() > self._most_characters:
            self.matchers.popitem(last=False)
        return matcher.deep_copy()

    def _num_characters(self) -> int:
        return sum(len(text) for _, text in self.matchers)

    @property
    def _most_characters(self) -> int:
        return MAX_COMPILED_SIZES * self.max_bytes


def make_grammars(
    config: EngineConfig, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int]
) -> Grammars | None:
    """None where forms are not offered (see `why_none`). Raises ConfigError where they are asked
    for by name and llguidance is not installed.
    """
    backend = config.guided_decoding_backend
    if backend == "off":
        return None
    if importlib.util.find_spec("llguidance") is None:
        if backend != "auto":
            raise ConfigError(
                f"guided_decoding_backend={backend} needs the library llguidance, which is not "
                "installed; install it, or leave the setting out"
            )
        return None
    if backend == "xgrammar":
        log.warning("guided_decoding_backend=xgrammar is served by llguidance")
    eos_ids = list(eos_ids)
    if tokenizer is None or not eos_ids:
        return None
    return Grammars(
        tokenizer,
        vocab_size,
        eos_ids,
        max_bytes=config.guided_decoding_max_bytes,
        any_whitespace=not config.guided_decoding_disable_any_whitespace,
    )


def why_none(config: EngineConfig) -> RequestError:
    """What to say to a request that needs grammars where there are none."""
    if config.guided_decoding_backend == "off":
        return _refused(
            "is switched off on this server (guided_decoding_backend=off); leave it out"
        )
    if importlib.util.find_spec("llguidance") is None:
        return _refused("needs the library llguidance, which is not installed; install it")
    return _refused("needs a model with a tokenizer and a token that ends an answer")


class _TokenBytes:
    """Our tokenizer as llguidance wants it: the bytes of each id.

    Control tokens begin with 0xff, which no text has: a form that speaks of text never allows one.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = eos_ids[0]
        stands_for = [tokenizer.join_bytes([token]) for token in range(vocab_size)]
        # The byte token of 0xff, which no form allows, would be taken for a control token.
        self.tokens = [b"" if one.startswith(b"\xff") else one for one in stands_for]
        self.special_token_ids = []
        for name in tokenizer.control_tokens:
            token = tokenizer.id_of(name)
            assert token is not None, f"{name} is a token without an id"
            self.tokens[token] = b"\xff" + name.encode()
            self.special_token_ids.append(token)

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def grammar_of(
    guided: GuidedDecodingParams, tokenizer: Tokenizer, *, any_whitespace: bool = True
) -> str:
    """A form in llguidance's own language. Raises RequestError for what has no such form.

    Its header switches off that text which is certain is only allowed in the tokens into which the
    tokenizer would cut it: all tokens that the form allows compete, with the model's odds.
    """
    kind, text = guided.kind, guided.text
    if kind == "grammar":
        lark = lark_of(text)
    elif kind == "structural_tag":
        lark = _lark_of_tags(checked_tags(guided), tokenizer, any_whitespace)
    else:
        lark = f"start: {expansion_of(guided, any_whitespace=any_whitespace)}"
    return lark if HEADER.search(lark) else f'%llguidance {{"no_forcing": true}}\n{lark}'


def expansion_of(guided: GuidedDecodingParams, *, any_whitespace: bool = True) -> str:
    """A form that is neither a grammar nor a structural tag as what a rule of Lark expands to.

    Raises RequestError.
    """
    kind, text = guided.kind, guided.text
    if kind == "regex":
        escaped = re.sub(r"\\.|/|\n", lambda m: _IN_REGEX.get(m[0], m[0]), text, flags=re.DOTALL)
        return f"/{escaped}/"
    if kind == "choice":
        return " | ".join(map(_quoted, json.loads(text)))
    schema = {"type": "object"} if kind == "json_object" else _object(kind, text)
    return _lark_of_schema(schema, any_whitespace)


def lark_of(text: str) -> str:
    """A grammar in GBNF (as llama.cpp reads it) in Lark's form; one that is in it already as it is.

    Raises RequestError.
    """
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    if not re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
        return text
    try:
        return HEADER.sub("", gbnf_to_lark(text), count=1)
    except GbnfToLarkError as error:
        raise _refused(f"grammar cannot be used: {_reason(str(error))}") from None
    except RecursionError:
        raise _refused("grammar cannot be used: it is nested too deeply") from None


def _lark_of_schema(schema: dict[str, Any], any_whitespace: bool) -> str:
    """JSON of a schema, as a symbol. All that a schema could set itself under `x-guidance` is set,
    so that it sets none of it.
    """
    options = {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": any_whitespace,
        "whitespace_pattern": WHITESPACE if any_whitespace else None,
        "coerce_one_of": False,
        "lenient": False,
    }
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': options})}"
    except RecursionError:
        raise _refused("a schema is nested too deeply") from None


def checked_tags(guided: GuidedDecodingParams) -> dict[str, Any]:
    """A structural tag as an object whose `structures` and `triggers` are lists.

    Raises RequestError.
    """
    given = _object(guided.kind, guided.text)
    structures, triggers = given.get("structures"), given.get("triggers")
    if not (isinstance(structures, list) and structures and isinstance(triggers, list)):
        raise _refused(
            'structural_tag must have "structures", a list of objects with "begin", "schema" and '
            '"end", and "triggers", a list of texts'
        )
    return given


def _lark_of_tags(given: Mapping[str, Any], tokenizer: Tokenizer, any_whitespace: bool) -> str:
    """Free text in which each trigger begins a tag: `begin`, JSON of its schema, `end`.

    Source: the legacy form of structural tags, {"structures": [{"begin", "schema", "end"}],
    "triggers": [...]}, in which `begin` starts with one of the triggers.
    """
    structures, triggers = given["structures"], given["triggers"]
    rules = [f"start: ({' | '.join(f'tag_{i}' for i in range(len(structures)))})* rest"]
    rules += ["rest: TEXT", TEXT]
    for i, one in enumerate(structures):
        if not isinstance(one, dict) or not isinstance(one.get("begin"), str):
            raise _refused(f"structural_tag has structure {i} without a text as its begin")
        begin, end = one["begin"], one.get("end", "")
        starts = [t for t in triggers if isinstance(t, str) and t and begin.startswith(t)]
        if not starts or not isinstance(end, str) or not isinstance(one.get("schema"), dict):
            raise _refused(
                f"structural_tag has structure {i}, which takes a begin that starts with one of "
                "the triggers, an object as its schema and a text as its end"
            )
        body = [_lark_of_schema(one["schema"], any_whitespace), *_symbols(end, tokenizer)]
        rules += _rules_of_tag(i, starts[0], begin, body, tokenizer)
    return "\n".join(rules)


def _rules_of_tag(
    i: int, trigger: str, begin: str, body: list[str], tokenizer: Tokenizer
) -> Iterator[str]:
    first, *more = _symbols(begin, tokenizer)
    rest = " ".join([*_symbols(begin[len(trigger) :], tokenizer), *body])
    forms = f"trigger_{i} {rest}"
    if first.startswith("<"):  # a control token, which cannot be part of the text before it
        forms += f" | TEXT {' '.join([first, *more, *body])}"
    yield f"tag_{i}: {forms}"
    yield f"trigger_{i}[lazy]: TEXT {_quoted(trigger)}"


def _symbols(text: str, tokenizer: Tokenizer) -> list[str]:
    """A fixed text in a rule: what it spells of control tokens as such, the rest as text."""
    return [
        f"<[{piece}]>" if isinstance(piece, int) else _quoted(piece)
        for piece in tokenizer.split_control(text)
    ]


def _quoted(text: str) -> str:
    return json.dumps(text)  # Lark reads JSON's escapes


def _object(kind: str, text: str) -> dict[str, Any]:
    def integer(digits: str) -> int:
        number = int(digits)
        if -(2**63) < number < 2**63 and number in (int(float(number)), 2**63 - 1):
            return number
        raise ValueError(
            f"{digits[:40]} is an integer that a float64 within 64 bits does not hold; use one "
            "nearer to 0"
        )  # the library would round it, and negate -2**63 for ever

    try:
        value = json.loads(text, parse_int=integer)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{kind} cannot be read as JSON: {_reason(str(error))}") from None
    if not isinstance(value, dict):
        raise _refused(f"{kind} is a {type(value).__name__}; it takes a JSON object")
    return value


def _reason(message: str) -> str:
    """The line of a report that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    said = next((line for line in lines if line.startswith("error:")), lines[0])
    if said.startswith("NoExtension"):
        return "no answer fits it"
    said = said.removeprefix("error:").partition(" Enable '")[0]  # its options are not the user's
    return said.strip()[:MAX_REASON]


def _refused(what: str) -> RequestError:
    return RequestError(f"{PREFIX}{what}", param="guided_decoding")


def why_stuck(matcher: LLMatcher) -> str:
    """What to say to a request whose answer cannot go on."""
    if matcher.is_error():
        what = f"the answer's form has outgrown its limits: {_reason(matcher.get_error())}"
    else:
        what = "the form allows no token that the request's bans and biases leave; allow more"
    return str(_refused(what))
