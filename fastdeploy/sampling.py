"""How tokens of one request are chosen and when they end: `SamplingParams`, checked when made.

Field names, defaults and ranges are FastDeploy's; `stop` is matched on the text, not on tokens, so
its strings may be long and may begin and end inside a token. Values that cannot be honoured are
refused, never ignored. Imports no torch.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from fastdeploy.errors import RequestError

MAX_SEED = 922_337_203_685_477_580  # FastDeploy's bound, a digit short of 2**63
MAX_SAMPLES = 128
MAX_INTEGER = 2**63 - 1  # what a message to the engine can carry
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 32, 1024
MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20

# From the first to the second, both included; None: no bound but that of the type.
INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, MAX_SAMPLES),
    "best_of": (1, MAX_SAMPLES),
    "top_k": (-1, MAX_INTEGER),
    "seed": (0, MAX_SEED),
    "max_tokens": (1, MAX_INTEGER),
    "reasoning_max_tokens": (1, MAX_INTEGER),
    "response_max_tokens": (1, MAX_INTEGER),
    "min_tokens": (0, MAX_INTEGER),
    "logprobs": (-1, MAX_LOGPROBS),
    "prompt_logprobs": (-1, MAX_LOGPROBS),
}
NUMBERS: dict[str, tuple[float, float | None]] = {
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
}
ABOVE = frozenset({"repetition_penalty"})  # 0 itself is not allowed
TOKEN_LISTS = ("stop_token_ids", "bad_words_token_ids")


@dataclass(kw_only=True)
class GuidedDecodingParams:
    """Constraint on the form of the output: exactly one of the fields.

    `json` is a JSON schema and `structural_tag` an object with `structures` and `triggers`, each
    also as JSON text; `grammar` is in GBNF or in Lark's form. See `fastdeploy.engine.grammar`.
    """

    json: str | dict | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            raise _not_a_form(f"takes one of its fields, {len(given)} were given: {given}")
        for name in ("json", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, _as_json(name, value))
            elif not isinstance(value, str | None):
                raise _not_a_form(f"has a {name} that is neither an object nor JSON text")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise _not_a_form(f"has a {name} that is not a text")
        if self.choice is not None:
            is_list = isinstance(self.choice, list | tuple) and self.choice
            if not is_list or not all(isinstance(one, str) for one in self.choice):
                raise _not_a_form("takes for choice a list of one or more texts")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))

    @property
    def text(self) -> str:
        """What is given, as one text: it and the kind say all there is."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else _as_json(self.kind, value)


def _not_a_form(what: str) -> RequestError:
    return RequestError(f"guided decoding {what}", param="guided_decoding")


def _as_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise _not_a_form(f"has a {name} that is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise _not_a_form(f"has a {name} that cannot be said in JSON: {error}") from None


@dataclass(kw_only=True)
class SamplingParams:
    """Settings of one request.

    The next token is drawn from `softmax(logits / temperature)`, after penalties and biases,
    restricted by `min_p`, then `top_k`, then `top_p`. Temperature 0 (or `top_k=1`, or `top_p=0`)
    takes the most likely token, the smallest id among equals. With a `seed` the result depends on
    prompt and settings only, not on what else the engine is doing.
    """

    n: int = 1
    # So many samples are drawn, and the n with the highest mean log-probability (of the raw logits,
    # over all tokens of the sample) are returned, best first. None: n.
    best_of: int | None = None
    presence_penalty: float | None = None  # subtracted once from every token generated before
    frequency_penalty: float | None = None  # subtracted for each time a token was generated before
    # Divides (multiplies, if negative) the logit of a token of prompt or output; None means 1.
    repetition_penalty: float | None = None
    temperature: float | None = None  # None means 1
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None  # None: as many as max_model_len leaves room for
    reasoning_max_tokens: int | None = None  # of thoughts; then the closing tag is forced
    response_max_tokens: int | None = None  # of what is no thought, where the model thinks
    min_tokens: int = 1
    logprobs: int | None = None  # log-probability of each token and of this many likeliest ones
    prompt_logprobs: int | None = None
    temp_scaled_logprobs: bool = False  # logprobs of logits / temperature
    top_p_normalized_logprobs: bool = False  # logprobs within top_p; -9999 for what is outside
    # Never generated as the tokens into which the tokenizer cuts them, with or without a space in
    # front; where one spells a special token, that token is meant too.
    bad_words: Sequence[str] | None = None
    bad_words_token_ids: Sequence[int] | None = None
    guided_decoding: GuidedDecodingParams | None = None
    logit_bias: dict[int, float] | None = None
    # FastDeploy's way to say logit_bias, which it becomes.
    logits_processors_args: dict[str, Any] | None = None
    # "mean" or "last": no text is generated; the prompt's hidden states become one vector.
    pooling: str | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        for name in INTEGERS:
            setattr(self, name, plain_id(getattr(self, name)))
        for name in NUMBERS:
            setattr(self, name, _plain_number(getattr(self, name)))
        for name in TOKEN_LISTS:
            values = getattr(self, name)
            if isinstance(values, list | tuple):
                setattr(self, name, [plain_id(value) for value in values])
        if isinstance(self.logit_bias, dict):
            self.logit_bias = {plain_id(token): bias for token, bias in self.logit_bias.items()}
        if self.logits_processors_args:
            self._take_processor_arguments()
        self.validate()

    def _take_processor_arguments(self) -> None:
        arguments = dict(self.logits_processors_args or {})
        bias = arguments.pop("logit_bias", None)
        if arguments:
            raise RequestError(
                f"logits_processors_args has {sorted(arguments)}; only logit_bias is known",
                param="logits_processors_args",
            )
        if bias and self.logit_bias:
            raise RequestError(
                "logit_bias is given twice, as itself and in logits_processors_args; leave out one",
                param="logit_bias",
            )
        try:
            # Text: what JSON has made of ids.
            taken = {
                int(token) if isinstance(token, str) else plain_id(token): float(value)
                for token, value in (bias or {}).items()
            }
        except (AttributeError, TypeError, ValueError):
            raise TypeError("logit_bias must map token ids to numbers") from None
        self.logit_bias, self.logits_processors_args = taken or self.logit_bias, None

    def validate(self) -> None:
        """Raise RequestError, naming the field, for a value outside its range."""
        for name, (low, high) in INTEGERS.items():
            self._integer(name, low, high)
        for name, (least, most) in NUMBERS.items():
            self._number(name, least, most, open_low=name in ABOVE)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}",
                param="min_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of={self.best_of} is less than n={self.n}; it takes n or more",
                param="best_of",
            )
        thoughts, total = self.reasoning_max_tokens, self.max_tokens
        if thoughts is not None and total is not None and thoughts > total:
            raise RequestError(
                f"reasoning_max_tokens={thoughts} is more than max_tokens={total}, which bounds "
                "thoughts and answer together",
                param="reasoning_max_tokens",
            )
        if self.pooling not in (None, "mean", "last"):
            raise RequestError(
                f"pooling={self.pooling!r} is not known; use mean or last", param="pooling"
            )
        self._lists()

    @property
    def num_samples(self) -> int:
        """Samples that are drawn, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and _may_be_none(name):
            return
        span = f"at least {low}" if high == MAX_INTEGER else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(f"{name}={value!r} is not an integer; it takes {span}", param=name)
        if not low <= value <= high:
            raise RequestError(f"{name}={value} is out of range; it takes {span}", param=name)

    def _number(self, name: str, low: float, high: float | None, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if value is None and _may_be_none(name):
            return
        span = f"{'more than' if open_low else 'at least'} {low}"
        span = span if high is None else f"from {low} to {high}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise RequestError(f"{name}={value!r} is not a number; it takes {span}", param=name)
        if value < low or (high is not None and value > high) or (open_low and value == low):
            raise RequestError(f"{name}={value} is out of range; it takes {span}", param=name)

    def _lists(self) -> None:
        _strings("stop", self.stop, MAX_STOP_STRINGS)
        _strings("bad_words", self.bad_words, MAX_BIASED_TOKENS)
        for name in TOKEN_LISTS:
            _token_ids(name, getattr(self, name))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise RequestError("logit_bias must map token ids to numbers", param="logit_bias")
            _token_ids("logit_bias", list(self.logit_bias))
            for token, bias in self.logit_bias.items():
                if not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                    raise RequestError(
                        f"logit_bias of token {token} is {bias!r}; it takes -100 to 100",
                        param="logit_bias",
                    )


# Settings that a request may leave to the model's generation_config.json.
_RECOMMENDED = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def recommended(generation_config: Mapping[str, Any]) -> dict[str, float]:
    """The settings of a model's generation_config.json that stand in where a request has None.

    Raises RequestError for a value out of range.
    """
    values = {name: generation_config.get(name) for name in _RECOMMENDED}
    found: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    SamplingParams(**found)
    return found


def filled(params: SamplingParams, defaults: Mapping[str, float]) -> SamplingParams:
    """`params` with `defaults` in place of what is None."""
    missing: dict[str, Any] = {n: v for n, v in defaults.items() if getattr(params, n) is None}
    return replace(params, **missing) if missing else params


def plain_id(value: Any) -> Any:
    """An integer of any library as Python's; what is none as it is, for the checks to refuse."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _plain_number(value: Any) -> Any:
    """A real number of any library as Python's; what is none as it is, for the checks to refuse."""
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def _may_be_none(name: str) -> bool:
    return SamplingParams.__dataclass_fields__[name].default is None


def _strings(name: str, values: Sequence[str] | None, most: int) -> None:
    if values is None:
        return
    if not isinstance(values, (list, tuple)) or len(values) > most:
        raise RequestError(f"{name} takes a string or a list of up to {most} strings", param=name)
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"{name} has a member that is not a text of 1 to {MAX_STOP_CHARACTERS} characters",
                param=name,
            )


def _token_ids(name: str, values: Sequence[int] | None) -> None:
    if values is None:
        return
    if not isinstance(values, (list, tuple)) or len(values) > MAX_BIASED_TOKENS:
        raise RequestError(f"{name} takes up to {MAX_BIASED_TOKENS} token ids", param=name)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{name} has {value!r}, which is not a token id", param=name)
