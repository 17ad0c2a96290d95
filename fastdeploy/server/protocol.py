"""What clients may send: the request bodies, read strictly, and their way into `SamplingParams`.

Every field is in one of these groups:

    offered      a field of a model below
    harmless     metadata that cannot change the answer: accepted, unused (`HARMLESS`)
    not offered  would change the answer and is not there: refused by name unless it asks for
                 nothing (`NOT_OFFERED`)
    unknown      refused when it looks like a misspelt field, else accepted and unused, as
                 FastDeploy does; the server logs its name
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ernie.settings import did_you_mean
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams, SamplingParams

log = logging.getLogger("fastdeploy")

HARMLESS = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "collect_metrics",
        "trace_context",
    )
)
# With the values that ask for nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "mm_hashes": (None, []),
    "disaggregate_info": (None,),
    "include_draft_logprobs": (None, False),
    "use_beam_search": (None, False),
}
# Older names, with the values that ask for nothing, and what is to be sent in their place.
REPLACED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": ((None, []), "tools"),
    "function_call": ((None, "none", "auto"), "tool_choice"),
}
MAX_NAMES_LOGGED = 100
MAX_DEPTH = 64  # of a body; what walks through it may call itself
MAX_EXTRAS = 64  # each is compared with all names there are
_logged: set[str] = set()


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = True
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None  # there is none


class Addressed(BaseModel):
    """Fields of whatever goes to the engine: to which model, as whose, how urgently."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = "default"
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)  # lower runs first
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)


class Common(Addressed):
    """Fields of both kinds of request. Ranges are checked by SamplingParams."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    reasoning_max_tokens: int | None = None
    response_max_tokens: int | None = None
    temp_scaled_logprobs: bool | None = None
    top_p_normalized_logprobs: bool | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    logits_processors_args: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None  # the beginning of the answer, to be continued
    return_token_ids: bool | None = False
    include_logprobs_decode_token: bool | None = True  # false: token_id:5 instead of the text
    max_streaming_response_tokens: int | None = Field(default=None, ge=1)  # in an event

    def sampling_params(self) -> SamplingParams:
        """Raises RequestError naming the field that is out of range."""
        known = SamplingParams.__dataclass_fields__.keys() & Common.model_fields.keys()
        values = {name: getattr(self, name) for name in known}
        values["logprobs"], values["max_tokens"] = self.num_logprobs(), self.most_tokens()
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(k): v for k, v in self.logit_bias.items()}
        try:
            return SamplingParams(**{name: v for name, v in values.items() if v is not None})
        except TypeError as error:
            raise RequestError(str(error), param="logits_processors_args") from None

    def form(self) -> tuple[str, GuidedDecodingParams] | None:
        """What the answer is held to, and the field that says so; None for free text.

        Raises RequestError for more than one.
        """
        fields = (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "structural_tag",
        )
        values = {name: getattr(self, name) for name in fields}
        given: dict[str, dict[str, Any]] = {
            name: {name.removeprefix("guided_"): value}
            for name, value in values.items()
            if value is not None
        }
        if self.response_format is not None and (form := _response_format(self.response_format)):
            given["response_format"] = form
        if not given:
            return None
        if len(given) > 1:
            raise RequestError(
                f"{' and '.join(given)} are given; an answer has one form: leave out all but one",
                param=list(given)[-1],
            )
        ((name, form),) = given.items()
        try:
            return name, GuidedDecodingParams(**form)
        except RequestError as error:
            raise RequestError(str(error), param=name) from None

    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def most_tokens(self) -> int | None:
        return self.max_tokens


class ChatRequest(Common):
    messages: list[dict[str, Any]] | None = Field(
        default=None,
        description="Turns; in those of users and tools, pictures are parts of the types image_url "
        "and video_url.",
    )
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    enable_thinking: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    disable_chat_template: bool | None = False
    mm_processor_kwargs: dict[str, Any] | None = None  # how its pictures are read
    metadata: dict[str, Any] | None = None

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
            return None
        return self.top_logprobs or 0

    def most_tokens(self) -> int | None:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                f"max_tokens={old} and max_completion_tokens={new} differ; give one of them",
                param="max_completion_tokens",
            )
        return old if new is None else new


class CompletionRequest(Common):
    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    echo: bool | None = False
    logprobs: int | None = Field(default=None)

    def num_logprobs(self) -> int | None:
        return self.logprobs


Body = TypeVar("Body", bound=Common)
Kind = TypeVar("Kind", bound=BaseModel)


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Refuses what JSON does not have (NaN, Infinity) and what cannot be text."""
    try:
        text = body.decode("utf-8-sig")  # which has no half characters but as escapes
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise RequestError("the body has a lone surrogate; send whole characters") from None
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8; send JSON in UTF-8") from None
    except RequestError:
        raise
    except ValueError as error:  # bad syntax, or an integer of thousands of digits
        raise RequestError(f"the body is not JSON: {error}") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _refuse_depth(value)
    if not isinstance(value, dict):
        raise RequestError(f"the body is a {type(value).__name__}; send a JSON object")
    return value


def parse(kind: type[Body], values: dict[str, Any]) -> Body:
    """The request in a JSON object. Raises RequestError naming the field at fault."""
    body = with_extras(kind, values)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise RequestError(
            f"best_of={body.best_of} cannot be streamed: which samples are the best is known at "
            "the end; leave out stream or best_of",
            param="best_of",
        )
    return body


def validated(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Fields, types and ranges. Raises RequestError naming the field at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        raise RequestError(f"{name}: {first['msg']}", param=name) from None


def with_extras(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """`validated`, and fields that are not of this kind judged as the head of this file says."""
    body = validated(kind, values)
    extras = body.model_extra or {}
    if len(extras) > MAX_EXTRAS:
        raise RequestError(
            f"the body has {len(extras)} fields that are not those of such a request; "
            f"{MAX_EXTRAS} at most are put up with"
        )
    for name, value in extras.items():
        _check_extra(kind, name, value)
    return body


def _check_extra(kind: type[BaseModel], name: str, value: Any) -> None:
    if name in HARMLESS:
        return
    if name in REPLACED:
        neutral, newer = REPLACED[name]
        if value not in neutral:
            raise RequestError(f"{name} is the older form of {newer}; send {newer}", param=name)
        return
    if name in ChatRequest.model_fields:
        if value not in (None, False, [], {}, "none", "auto"):
            raise RequestError(f"{name} belongs to chat completions; leave it out", param=name)
        return
    if name in NOT_OFFERED:
        if value not in NOT_OFFERED[name]:
            raise RequestError(f"{name} is not available on this server; leave it out", param=name)
        return
    suggestion = did_you_mean(name, kind.model_fields)
    if suggestion:
        raise RequestError(f"unknown field {name[:64]!r}{suggestion}", param=name[:64])
    if name not in _logged and len(_logged) < MAX_NAMES_LOGGED:
        _logged.add(name)
        log.warning("requests have a field %.64r, which is not known and has no effect", name)


def _refuse_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        values = (one.values() if isinstance(one, dict) else one for one in level)
        level = [child for some in values for child in some if isinstance(child, (dict, list))]
        if not level:
            return
    raise RequestError(f"the body is nested too deeply; {MAX_DEPTH} levels are read")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse_constant(text[:64])
    return value


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """The argument of GuidedDecodingParams that it stands for; empty for plain text."""
    kind = given.get("type")
    keys = {
        "text": set(),
        "json_object": set(),
        "json_schema": {"json_schema"},
        "structural_tag": {"structures", "triggers"},
    }
    if not isinstance(kind, str) or kind not in keys:
        raise RequestError(
            f"response_format has the type {str(kind)[:64]!r}; it takes one of {', '.join(keys)}",
            param="response_format",
        )
    if unknown := sorted(given.keys() - keys[kind] - {"type"}):
        raise RequestError(
            f"response_format of type {kind} has the key {unknown[0][:64]!r}; leave it out",
            param="response_format",
        )
    if kind == "structural_tag":
        return {"structural_tag": {name: given.get(name) for name in keys[kind]}}
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        described = given.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise RequestError(
                "response_format has no schema; send the JSON schema as json_schema.schema",
                param="response_format",
            )
        return {"json": schema}
    return {}


def _refuse_constant(name: str) -> None:
    raise RequestError(f"the body has {name}, which no number here can be; send finite ones")


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise RequestError(
            f"logit_bias has the key {text[:64]!r}; keys are token ids", param="logit_bias"
        )
    return int(text)
