"""`/v1/chat/completions`: messages to a prompt, pieces to chat messages."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from ernie.chat import ChatTemplate
from ernie.tokenizer import Detokenizer
from ernie.vision.prompt import Inputs, Processor
from fastdeploy.engine.language import Language
from fastdeploy.engine.prompt import chat_inputs, chat_prompt
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, Logprob, TokenLogprobs
from fastdeploy.sampling import SamplingParams
from fastdeploy.server.engine import Piece
from fastdeploy.server.grammars import told_of
from fastdeploy.server.message import Message, Reading, ReasoningTokens, Said
from fastdeploy.server.parsers import Syntax
from fastdeploy.server.pictures import PromptPictures
from fastdeploy.server.protocol import ChatRequest
from fastdeploy.server.reply import Reply, likeliest
from fastdeploy.server.tools import ToolUse, check_history, constraint_for, tool_use

log = logging.getLogger("fastdeploy")

# reasoning_effort as the most tokens of thought; none: no thought, the missing ones: no limit.
EFFORT_TOKENS = {"minimal": 256, "low": 1024, "medium": 4096}
_TAIL = 16  # tokens of a prompt that show whether a thought is open


@dataclass(frozen=True, slots=True)
class ChatOrder:
    """A chat request as the engine takes it, and how its answers are read."""

    prompt: list[int]
    params: SamplingParams
    reading: Reading
    pictures: PromptPictures | None


def chat_order(
    body: ChatRequest,
    params: SamplingParams,
    language: Language,
    syntax: Syntax,
    *,
    trusts: bool,
    form_field: str = "tools",
    processor: Processor | None = None,
) -> ChatOrder:
    """`syntax` is that of the model; `trusts`: a request may bring its own template. The form in
    `params` is the one that the field `form_field` asks for. `processor` reads the pictures, which
    takes a while: call it in a thread if there are any.

    Raises RequestError, ChatError naming the message at fault, or MediaError naming the part.
    """
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if use.tools and not syntax.has_calls:
        raise RequestError(
            "this server knows no form of tool calls for its model; start with tool_call_parser "
            "(--tool-call-parser), or leave out tools",
            param="tools",
        )
    params = _with_effort(params, body, syntax)
    found = _prompt(body, use, language, trusts, processor)
    pictures = PromptPictures.of(found) if isinstance(found, Inputs) else None
    prompt = found.token_ids if isinstance(found, Inputs) else found
    wanted = Syntax(syntax.thoughts, bool(use.tools))
    in_thought = wanted.begins_in_thought(language.tokenizer.decode(prompt[-_TAIL:]))
    with told_of(form_field):
        form = constraint_for(
            use,
            params.guided_decoding,
            language.tokenizer,
            follows_thought=in_thought,
            any_whitespace=not language.config.guided_decoding_disable_any_whitespace,
        )
    ids = {language.tokenizer.id_of(tag) for tag in wanted.tags}
    shown = language.tokenizer.special_ids & ids
    reading = Reading(
        wanted,
        in_thought=in_thought,
        begun=Detokenizer(language.tokenizer, shown=shown).push(body.completion_token_ids or ()),
        parallel=use.parallel,
        shown=shown,
        is_held=bool(use.tools) and form is not None,
    )
    return ChatOrder(prompt, replace(params, guided_decoding=form), reading, pictures)


def _prompt(
    body: ChatRequest, use: ToolUse, language: Language, trusts: bool, processor: Processor | None
) -> list[int] | Inputs:
    if body.prompt_token_ids is not None:
        return body.prompt_token_ids
    if not body.messages:
        raise RequestError("messages is empty; send at least one", param="messages")
    if body.disable_chat_template:
        return _raw_prompt(body, language)
    check_history(body.messages)
    template = language.template
    if body.chat_template is not None:
        template = _template_of_request(body.chat_template, language, trusts)
    messages = [_as_templates_know_it(i, message) for i, message in enumerate(body.messages)]
    arguments = template, language.tokenizer, messages, use.tools, _options(body)
    if processor is None:
        return chat_prompt(*arguments)
    return chat_inputs(processor, *arguments, changes=body.mm_processor_kwargs)


def _raw_prompt(body: ChatRequest, language: Language) -> list[int]:
    assert body.messages
    content = body.messages[0].get("content")
    if len(body.messages) > 1 or not isinstance(content, str) or body.tools:
        raise RequestError(
            "disable_chat_template takes one message, whose content (a text) is the prompt as it "
            "stands, and no tools",
            param="disable_chat_template",
        )
    return language.tokenizer.encode(content)


def _template_of_request(source: str, language: Language, trusts: bool) -> ChatTemplate:
    if not trusts:
        raise RequestError(
            "chat_template in requests is not allowed here; leave it out, or start with "
            "trust_request_chat_template (--trust-request-chat-template)",
            param="chat_template",
        )
    return ChatTemplate.from_sources({"default": source}, "chat_template", language.tokenizer)


def _as_templates_know_it(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """Newer and older spellings: role developer, FastDeploy's `thoughts`."""
    if message.get("function_call"):
        raise RequestError(
            f"messages[{i}].function_call is the older form of tool_calls; send tool_calls",
            param="messages",
        )
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    if message.get("thoughts") and message.get("reasoning_content") is None:
        message = {**message, "reasoning_content": message["thoughts"]}
    return message


def _options(body: ChatRequest) -> dict[str, Any]:
    """Variables for the template; thinking can be asked for in four places, which have to agree."""
    options = dict(body.chat_template_kwargs or {})
    given = {
        "chat_template_kwargs.enable_thinking": options.get("enable_thinking"),
        "enable_thinking": body.enable_thinking,
        "metadata.enable_thinking": (body.metadata or {}).get("enable_thinking"),
        "reasoning_effort": body.reasoning_effort and body.reasoning_effort != "none",
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, bool):
            raise RequestError(
                f"{name} is {str(value)[:64]!r}; it takes true or false", param=name.split(".")[0]
            )
    if len(set(given.values())) > 1:
        names = " and ".join(given)
        raise RequestError(f"{names} contradict each other; give one", param="enable_thinking")
    if given:
        options["enable_thinking"] = next(iter(given.values()))
    return options


def _with_effort(params: SamplingParams, body: ChatRequest, syntax: Syntax) -> SamplingParams:
    """A budget of thought in place of `reasoning_effort`, where none is given in tokens."""
    effort = body.reasoning_effort
    if effort in (None, "none"):
        return params
    if syntax.thoughts is None:
        raise RequestError(
            f"reasoning_effort={effort!r}: this model does not think; leave it out",
            param="reasoning_effort",
        )
    tokens = EFFORT_TOKENS.get(str(effort))
    if tokens is None or params.reasoning_max_tokens is not None:
        return params
    return replace(params, reasoning_max_tokens=min(tokens, params.max_tokens or tokens))


class ChatReply(Reply):
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.messages = [Message(self.context.reading) for _ in self.num_generated]
        reading, tokenizer = self.context.reading, self.context.tokenizer
        self.reasoning = [ReasoningTokens(reading, tokenizer) for _ in self.num_generated]
        self.new = Said()  # in the newest piece

    def first_choices(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        choices = range(len(self.num_generated))
        return [self._event(i, role | self.prompt_tokens(i), None) for i in choices]

    def delta(self, piece: Piece) -> dict[str, Any] | None:
        completion, message, new = piece.completion, self.messages[piece.choice], self.new
        delta = message.delta(new)
        if completion.finish_reason is not None and message.diverges():
            self.context.on_divergence()
            log.error("choice %d of %s differs from its stream", piece.choice, self.head["id"])
        if not (delta or new.logprobs or completion.finish_reason or self.body.return_token_ids):
            return None
        reason = message.finish_reason(completion.finish_reason)
        delta |= self.answer_tokens(completion)
        event = self._event(piece.choice, delta, reason)
        event["logprobs"] = self._logprobs(new.logprobs) if new.logprobs else None
        if completion.stop_reason is not None:
            event["stop_reason"] = completion.stop_reason
        return event | self.scores(piece.choice)

    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        message = self.messages[completion.index]
        wanted = completion.logprobs is not None
        tokens = self.prompt_tokens(index) | self.answer_tokens(completion)
        return {
            "index": index,
            "message": message.whole() | tokens,
            "logprobs": self._logprobs(message.said.logprobs) if wanted else None,
            "finish_reason": message.finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
            **self.scores(index),
        }

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        if self.context.reading.syntax.thoughts is not None:
            thoughts = sum(one.num for one in self.reasoning)
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage

    def _take(self, piece: Piece) -> None:
        super()._take(piece)
        self.reasoning[piece.choice].push(piece.completion.token_ids)
        self.new = self.messages[piece.choice].push(piece.completion)

    def _event(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        return {"content": [self._token(entry) for entry in entries]}

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        token, own = next(iter(entry.items()))
        top = likeliest(entry, self.context.num_top)
        return {
            **self._described(token, own),
            "top_logprobs": [self._described(other, value) for other, value in top],
        }

    def _described(self, token: int, value: Logprob) -> dict[str, Any]:
        return {
            "token": self.name_of(token, value.decoded_token),
            "logprob": value.logprob,
            "bytes": list(self.context.tokenizer.join_bytes([token])),
        }
