"""Answers held to a form, as a program meets them: they have it, whatever the model would say."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import threading
from pathlib import Path
from typing import Any

import helpers_tokenizer
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ernie import Tokenizer
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from fastdeploy import LLM, GuidedDecodingParams, SamplingParams
from fastdeploy.engine.constraint import Constraint
from fastdeploy.engine.grammar import Grammars, expansion_of
from fastdeploy.engine.timed import Job, TimedThread
from fastdeploy.errors import RequestError

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def held(max_tokens: int = 200, **form: Any) -> SamplingParams:
    options = {k: form.pop(k) for k in list(form) if k in SamplingParams.__dataclass_fields__}
    guided = GuidedDecodingParams(**form)
    return SamplingParams(
        **{"seed": 1, "max_tokens": max_tokens, **options, "guided_decoding": guided}
    )


def said(llm: LLM, params: SamplingParams, prompt: str = "Hello!") -> list[Any]:
    return list(llm.generate(prompt, params)[0].outputs)


def grammars(folder: Path, **options: Any) -> Grammars:
    tokenizer = Tokenizer.from_folder(folder)
    size = tokenizer.vocab_size + 5  # a model's vocabulary is padded
    return Grammars(tokenizer, size, tokenizer.eos_ids, **{"max_bytes": 65536} | options)


def fits(matcher: Any, tokens: list[int]) -> bool:
    """Whether a whole answer has the form; the matcher stays where it is."""
    copy = matcher.deep_copy()
    return copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting()


def allowed(matcher: Any) -> list[int]:
    bits = np.frombuffer(matcher.deep_copy().compute_bitmask(), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_masks_see_the_bytes_of_every_token(kind: str, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        folder = helpers_tokenizer.sentencepiece_folder(tmp_path / "t", thinking=True)
    else:
        folder = helpers_tokenizer.byte_level_folder(tmp_path / "t")
    made = grammars(folder)
    made.compile(GuidedDecodingParams(regex="a"))
    assert made.tokens is not None
    control = {made.tokenizer.id_of(name) for name in made.tokenizer.control_tokens}
    for token in range(made.vocab_size):
        if token in control:
            assert made.tokens.is_special_token(token), made.tokenizer.token_of(token)
        elif (own := made.tokenizer.join_bytes([token])) not in (b"", b"\xff"):  # never in a text
            assert made.tokens.decode_bytes([token]) == own, token
    anything = set(allowed(made.compile(GuidedDecodingParams(regex=r"[ -~]+"))))
    expected = {
        token
        for token in set(range(made.tokenizer.vocab_size)) - control
        if re.fullmatch(rb"[ -~]+", made.tokenizer.join_bytes([token]))
    }
    assert anything == expected, anything ^ expected


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema's definition, for the keywords that `schemas` makes."""
    if "anyOf" in schema:
        return any(is_valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            found = re.search(schema.get("pattern", ""), value) if isinstance(value, str) else None
            return bool(found) and schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
        case "array":
            least, most = schema["minItems"], schema["maxItems"]
            good = isinstance(value, list) and least <= len(value) <= most
            return good and all(is_valid(one, schema["items"]) for one in value)
        case "object":
            if not isinstance(value, dict) or set(schema["required"]) - set(value):
                return False
            own = schema["properties"]
            return all(key in own and is_valid(one, own[key]) for key, one in value.items())
        case kind:
            return {"boolean": bool, "null": type(None)}[kind] is type(value)


def objects(members: st.SearchStrategy) -> st.SearchStrategy:
    names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=4)

    @st.composite
    def one(draw: Any) -> dict[str, Any]:
        own = draw(st.dictionaries(names, members, max_size=3))
        required = [name for name in own if draw(st.booleans())]
        return {
            "type": "object",
            "properties": own,
            "required": required,
            "additionalProperties": False,
        }

    return one()


def spans(low: str, high: str, top: int, **rest: Any) -> st.SearchStrategy:
    pairs = st.tuples(st.integers(0, top), st.integers(0, top)).map(sorted)
    return pairs.map(lambda pair: {**rest, low: pair[0], high: pair[1]})


leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    spans("minimum", "maximum", 10**6, type="integer"),
    spans("minLength", "maxLength", 6, type="string"),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}-\\d$", "maxLength": 9}]),
    st.lists(
        st.one_of(st.text('ab"\\é\n', max_size=4), st.integers(-(2**53), 2**53), st.none()),
        min_size=1,
    ).map(lambda values: {"enum": values[:4]}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        spans("minItems", "maxItems", 3, type="array").flatmap(
            lambda array: inner.map(lambda items: {**array, "items": items})
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=5,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_answers_conform_to_any_schema(llm: LLM, schema: dict[str, Any], seed: int) -> None:
    (one,) = said(llm, held(json=schema, seed=seed, temperature=1.5, max_tokens=600))
    assume(one.finish_reason != "length")  # lists of lists, each line with its spaces
    assert one.finish_reason == "stop", one
    value = json.loads(one.text)
    assert is_valid(value, schema), (schema, value)


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{2,9}@(x|yy)\.org", r"(a+)+$", r"\d{3}(-\d{2}){1,3}", r"是(的|吗)?。", r""]
)
def test_answers_match_the_regex(llm: LLM, pattern: str) -> None:
    for one in said(llm, held(regex=pattern, n=6, max_tokens=80)):
        whole = re.fullmatch(pattern, one.text)
        assert whole and one.finish_reason == "stop", one


@given(st.text(alphabet="ab/\\\n[]", max_size=12))
def test_a_regex_is_escaped_as_the_library_does_it(text: str) -> None:
    from llguidance import LLMatcher

    backslashes = len(text) - len(text.rstrip("\\"))
    assume(backslashes % 2 == 0)  # the library leaves out half an escape at the end
    (grammar,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
    ours = expansion_of(GuidedDecodingParams(regex=text))
    assert f"start: {ours}" == grammar["lark_grammar"]


@pytest.mark.parametrize("number", [2**53, -(2**53), 2**60, 2**63 - 1024, 1024 - 2**63, 2**63 - 1])
def test_large_integers_come_whole(llm: LLM, number: int) -> None:
    assert said(llm, held(json={"enum": [number]}))[0].text == str(number)
    if number > 0:  # a bound that schemas of 64-bit integers have
        assert int(said(llm, held(json={"type": "integer", "maximum": number}))[0].text) <= number


def test_answers_are_among_the_choices_and_all_of_these_come(llm: LLM) -> None:
    choices = ["yes", 'say "no"', "line\nbreak", "back\\slash", "yes, and é", "tab\t|a", "\x00"]
    answers = said(llm, held(choice=choices, n=100, temperature=3.0))
    assert {one.text for one in answers} == set(choices)
    assert {one.finish_reason for one in answers} == {"stop"}


GBNF = 'root ::= "(" item ("," item)* ")"\nitem ::= [0-9]{1,2} | root'
LARK = 'start: "(" item ("," item)* ")"\nitem: /[0-9]{1,2}/ | start'


@pytest.mark.parametrize("grammar", [GBNF, LARK])
def test_answers_follow_a_recursive_grammar_in_both_notations(llm: LLM, grammar: str) -> None:
    params = held(
        grammar=grammar,
        n=6,
        max_tokens=200,
    )
    whole = [one.text for one in said(llm, params) if one.finish_reason == "stop"]
    assert whole
    for text in whole:
        lists = text.replace("(", "[").replace(")", "]")
        assert isinstance(json.loads(re.sub(r"\b0(\d)", r"\1", lists)), list), text


def test_a_json_object_is_one(llm: LLM) -> None:
    for one in said(llm, held(json_object=True, n=8, max_tokens=240, temperature=0.8)):
        if one.finish_reason == "stop":
            assert isinstance(json.loads(one.text), dict), one.text
        else:
            assert one.text.lstrip().startswith("{")


TAGS = {
    "structures": [
        {"begin": "<fn=get>", "schema": PERSON, "end": "</fn>"},
        {"begin": "<response>", "schema": {"enum": [1]}, "end": "</response>"},
    ],
    "triggers": ["<fn=", "<response>"],
}


def test_structural_tags_bind_what_stands_behind_a_trigger(tmp_path: Path) -> None:
    made = grammars(helpers_tokenizer.sentencepiece_folder(tmp_path / "t", thinking=True))
    matcher = made.compile(GuidedDecodingParams(structural_tag=TAGS))
    encode = made.tokenizer.encode
    person = '{"name": "x", "age": 3, "tags": []}'
    good = ["", "free text <b>", f"so <fn=get>{person}</fn> and <fn=get>{person}</fn>."]
    bad = ["<fn=got>", '<fn=get>{"age": 3}</fn>', f"<fn=get>{person}</fm>", "<fn=get>text"]
    for text in (*good, *bad):
        assert fits(matcher, encode(text)) == (text in good), text
    # Tags that are tokens of the vocabulary are these tokens, and no text that looks like them.
    assert fits(matcher, encode("so <response>1</response>.", allow_special=True))
    assert not fits(matcher, encode("so <response>2</response>.", allow_special=True))


def test_white_space_is_bounded_and_can_be_switched_off(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    schema = json.dumps({**PERSON, "x-guidance": {"whitespace_pattern": "[ ]+", "lenient": True}})
    loose, tight = (
        grammars(folder, any_whitespace=spaces).compile(GuidedDecodingParams(json=schema))
        for spaces in (True, False)
    )
    value = {"name": "x", "age": 3, "tags": ["a"]}
    compact = json.dumps(value, separators=(",", ":"))
    for text in (json.dumps(value), json.dumps(value, indent=2), json.dumps(value, indent="\t")):
        assert fits(loose, tokenizer.encode(text)), text
        assert not fits(tight, tokenizer.encode(text)), text
    for matcher in (loose, tight):
        assert fits(matcher, tokenizer.encode(compact))
        assert not fits(matcher, tokenizer.encode(compact.replace(":", ":" + " " * 40)))


def test_an_open_form_ends_where_the_model_says_and_ignore_eos_leaves_that_out(llm: LLM) -> None:
    eos = llm.engine.eos_ids
    always = dict.fromkeys(eos, 100.0)
    (one,) = said(llm, held(regex="[a-z]*", logit_bias=always))
    assert (one.text, one.finish_reason, one.token_ids[-1] in eos) == ("", "stop", True)
    (one,) = said(llm, held(regex="[a-z]{2,}", logit_bias=always))
    assert re.fullmatch("[a-z]{2,}", one.text) and one.finish_reason == "stop"
    (one,) = said(llm, held(regex="[a-z]*", logit_bias=always, min_tokens=5))
    assert len(one.token_ids) == 5 and one.token_ids[-1] in eos, "not before min_tokens"
    (one,) = said(llm, held(12, regex="[a-z]*", logit_bias=always, ignore_eos=True))
    assert (len(one.token_ids), one.finish_reason) == (12, "length")
    assert not eos & set(one.token_ids)
    (one,) = said(llm, held(12, regex="[a-z]{3}", ignore_eos=True, min_tokens=12))
    assert len(one.text) == 3 and one.finish_reason == "stop", "nothing but the end is possible"


def test_a_cut_answer_is_counted_and_a_whole_one_is_not(llm: LLM) -> None:
    before = llm.engine.stats().num_unfinished_forms
    (one,) = said(llm, held(3, json=PERSON))
    assert one.finish_reason == "length"
    assert llm.engine.stats().num_unfinished_forms == before + 1
    said(llm, held(json=PERSON))
    said(llm, held(4, regex="[a-z]*"))  # cut too, but it has the form
    assert llm.engine.stats().num_unfinished_forms == before + 1


def test_bans_that_leave_no_token_end_the_answer_with_an_error(llm: LLM) -> None:
    ids = [i for i in range(llm.engine.vocab_size) if b"x" in llm.tokenizer.join_bytes([i])]
    params = held(regex="axb", bad_words_token_ids=ids)
    other = SamplingParams(max_tokens=6, seed=3)
    failed, good = llm.generate(["Hello!", "Hello!"], [params, other])
    assert failed.error_code == 400 and "no token" in failed.error_msg
    assert (failed.outputs.finish_reason, failed.outputs.text) == ("error", "a")
    assert good.outputs.text == llm.generate("Hello!", other)[0].outputs.text
    assert good.error_msg is None


def test_a_form_that_outgrows_its_limits_ends_with_an_error_and_harms_no_other(llm: LLM) -> None:
    wide = held(regex=r"(\w{1,50}|\d+ ){1,50}x", seed=0)
    outputs = llm.generate(["Hello!"] * 3, [wide, held(choice=["fine"]), wide])
    assert [one.error_code for one in outputs] == [400, 200, 400]
    assert "outgrown its limits" in outputs[0].error_msg and "<" not in outputs[0].error_msg
    assert outputs[1].outputs.text == "fine"
    assert llm.generate("Hello!", held(regex=r"\w{2}"))[0].outputs.finish_reason == "stop"


# Three hundred readings of every letter: seconds for a mask, though the library counts little.
AMBIGUOUS = "\n".join(
    [
        "start: e",
        "e: " + " | ".join(f"e e x{i} | x{i}" for i in range(300)),
        *(f"x{i}: /[a-z ]{{1,{i % 9 + 1}}}/" for i in range(300)),
    ]
)


def test_a_form_whose_masks_take_long_ends_with_an_error_and_harms_no_other(llm: LLM) -> None:
    slow, fine = held(grammar=AMBIGUOUS, seed=0), held(regex="[a-z ]{40}", seed=0)
    free = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
    alone = [llm.generate("Hello!", params)[0].outputs for params in (fine, free)]
    outputs = llm.generate(["Hello!"] * 4, [slow, fine, slow, free])
    assert [one.error_code for one in outputs] == [400, 200, 400, 200]
    assert "guided_decoding_max_stall_ms" in outputs[0].error_msg
    beside = [outputs[i].outputs for i in (1, 3)]
    assert [one.token_ids for one in beside] == [one.token_ids for one in alone]


def test_a_job_that_takes_too_long_is_left_behind_and_the_others_are_done() -> None:
    thread, end, done = TimedThread("test"), threading.Event(), []
    jobs = [Job(lambda i=i: done.append(i) or i, 60.0) for i in range(4)]
    jobs[1] = Job(end.wait, 0.05)
    results = thread.begin(jobs).wait()
    assert [one and one.value for one in results] == [0, None, 2, 3]
    assert done == [0, 2, 3]
    end.set()
    assert [one.value for one in thread.begin([Job(lambda: 5, 60.0)]).wait()] == [5]
    assert results[1] is None  # what it said too late is not heard

    ends = thread.begin([Job(lambda: 6, 60.0)])
    ends.working.result()
    with pytest.MonkeyPatch.context() as patched:  # it ends just when the time is over
        result, errors = ends.working.result, [TimeoutError()]

        def late(timeout: float | None = None) -> None:
            if errors:
                raise errors.pop()
            return result(timeout)

        patched.setattr(ends.working, "result", late)
        assert [one and one.value for one in ends.wait()] == [6]

    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        thread.begin([Job(fails, 60.0)]).wait()


@pytest.mark.parametrize("num_drafts", [0, 5])
def test_drafts_cost_a_form_no_more_of_its_time_than_their_masks(num_drafts: int) -> None:
    constraint = Constraint(None, [], most_s=0.25)  # type: ignore[arg-type]
    for _ in range(1000):
        constraint.pay(0.008 * (1 + num_drafts), 1 + num_drafts)
    assert constraint.balance_s == 0.25
    for _ in range(30):
        constraint.pay(0.03 * (1 + num_drafts), 1 + num_drafts)
    assert constraint.balance_s < 0


REFUSED = [
    ({"regex": "(?=a)b"}, "look-ahead"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": "a" * 70_000}, "70000 bytes is longer than guided_decoding_max_bytes=65536"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "nested"),
    ({"regex": "\ud800"}, "a lone surrogate"),
    ({"regex": r"[^\s\S]"}, "no answer fits it"),
    ({"json": "{"}, "json cannot be read as JSON"),
    ({"json": "[1]"}, "json is a list; it takes a JSON object"),
    ({"json": "[" * 60_000}, "json cannot be read as JSON"),
    ({"json": {"const": 2**63}}, "float64 within 64 bits"),
    ({"json": {"enum": [[-(2**63)]]}}, "float64 within 64 bits"),
    ({"json": {"enum": [-(2**63) + 1]}}, "float64 within 64 bits"),
    ({"json": {"const": 2**53 + 1}}, "float64 within 64 bits"),
    ({"json": {"$ref": "#"}}, "no answer fits it"),
    ({"json": {"$ref": "http://127.0.0.1:9/schema.json"}}, "does not fetch"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
    ({"json": {"type": "florb"}}, "Invalid type: florb"),
    ({"json": {"enum": [f"v{i}" for i in range(10**5)]}}, "is longer than"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum .5. is greater"),
    ({"json": {"type": "string", "pattern": "foo**("}}, "cannot be used"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"oneOf": [{"type": "object"}] * 2}}, "oneOf constraints are not supported"),
    ({"grammar": "start: foo bar ("}, "cannot be used"),
    ({"grammar": "start: start"}, "no answer fits it"),
    ({"grammar": 'root ::= "a'}, "cannot be used"),
    ({"grammar": "root ::= " + "(" * 5000}, "nested too deeply"),
    ({"grammar": '%import "/etc/passwd"\nstart: "a"'}, "cannot be used"),
    ({"structural_tag": {}}, "must have"),
    ({"structural_tag": TAGS | {"triggers": ["<g"]}}, "starts with one of the triggers"),
]


@pytest.mark.parametrize(("form", "message"), REFUSED)
def test_forms_that_cannot_be_used_are_refused_in_one_sentence(
    llm: LLM, form: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate("Hello!", held(**form))
    assert caught.value.param == "guided_decoding" and caught.value.status == 400
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not llm.engine.requests


def test_thoughts_are_free_and_the_form_begins_behind_them(tmp_path: Path) -> None:
    folder = helpers_tokenizer.sentencepiece_folder(tmp_path / "thinker", thinking=True)
    tokenizer = Tokenizer.from_folder(folder)
    model = ErnieModel(
        dataclasses.replace(TINY["tiny-dense"], vocab_size=tokenizer.vocab_size),
        dtype=torch.float32,
    )
    model.init_weights(seed=3, std=0.3)
    model.tokenizer = tokenizer
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        block_size=8,
        think_stop_sentence="so\n</think>\n\n",
    )
    start, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    prompt = [*tokenizer.encode("Hello!"), start]
    choices, lengths = ["yes", "no"], set()
    for options in ({"reasoning_max_tokens": 5}, {"logit_bias": {end: 4.0}}):
        params = held(choice=choices, n=8, temperature=1.0, **options)
        for one in llm.generate(prompt, params)[0].outputs:
            text = tokenizer.decode(one.token_ids[one.token_ids.index(end) + 1 :])
            assert text.removeprefix("\n\n" if "reasoning_max_tokens" in options else "") in choices
            assert one.finish_reason == "stop"
            lengths.add(one.token_ids.index(end))
    assert len(lengths) > 2, "thoughts of several lengths"
    # Where the prompt has closed the thought the form holds from the beginning.
    (one,) = llm.generate([*prompt, end], held(choice=choices))[0].outputs
    assert tokenizer.decode(one.token_ids) in choices


@pytest.mark.parametrize("thinks", [False, True])
def test_an_interrupted_step_moves_no_form_on(tmp_path: Path, thinks: bool) -> None:
    folder = helpers_tokenizer.sentencepiece_folder(tmp_path / "thinker", thinking=True)
    tokenizer = Tokenizer.from_folder(folder)
    config = dataclasses.replace(TINY["tiny-dense"], vocab_size=tokenizer.vocab_size)
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=3, std=0.3)
    model.tokenizer = tokenizer
    llm = LLM(model, dtype="float32", max_model_len=128, block_size=8)
    start = tokenizer.id_of("<think>")
    prompt = [*tokenizer.encode("Hello!"), *([start] if thinks else [])]
    params = held(regex="[a-c]{6}(yes|no)[x-z]{5}", reasoning_max_tokens=3)
    (expected,) = llm.generate(prompt, params)[0].outputs

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    pooler, tokens, reason = llm.engine.pooler, [], None
    for (piece,) in llm.generate(prompt, params, stream=True):
        tokens += piece.outputs[0].token_ids
        reason = piece.outputs[0].finish_reason
        llm.engine.pooler = interrupted
        if reason is None:
            with pytest.raises(KeyboardInterrupt):
                llm.generate("Hello!", held(max_tokens=1, regex="a"))
        llm.engine.pooler = pooler
    assert (tokens, reason) == (expected.token_ids, "stop")


def test_switched_off_or_not_installed_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 64}
    off = LLM(str(folder), guided_decoding_backend="off", **options)
    with pytest.raises(RequestError, match="switched off"):
        off.generate("x", held(regex="a"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "llguidance" else find(name, *a),
    )
    with pytest.raises(RequestError, match="llguidance, which is not installed"):
        LLM(str(folder), **options).generate("x", held(regex="a"))
    with pytest.raises(ConfigError, match="guided_decoding_backend=llguidance needs"):
        LLM(str(folder), guided_decoding_backend="llguidance", **options)


def test_compiled_forms_are_kept_but_not_without_bound(folder: Path) -> None:
    made = grammars(folder, max_bytes=100)
    for i in range(200):
        made.begin(GuidedDecodingParams(regex=f"a{i}")).result()
    assert 0 < len(made.matchers) <= 64
    for i in range(20):
        made.begin(GuidedDecodingParams(regex=f"{i:090}")).result()
    assert sum(len(text) for _, text in made.matchers) <= 800


def test_a_text_that_outgrew_its_limits_leaves_the_kept_form_as_it_was(folder: Path) -> None:
    made = grammars(folder)
    form = GuidedDecodingParams(regex=r"(\w{1,50}|\d+ ){1,50}x")
    first = made.begin(form).result()
    while not first.is_error():
        token = allowed(first)[-1]
        first.try_consume_tokens([token])
        first.compute_bitmask()
    assert not made.begin(form).result().is_error()
