"""`LLM` from end to end on a tiny model: prompts, streams, stops, samples, scores, chat, errors."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json

import numpy as np
import pytest
import torch

import ernie
from ernie.generate import generate
from fastdeploy import LLM, GuidedDecodingParams, SamplingParams
from fastdeploy.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT = "Hello! The quick brown fox"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM):
    yield
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0), f"{stats}"
    assert stats.num_free_blocks == stats.num_blocks, f"{stats}"
    llm.engine.scheduler.check()


def merged(pieces):
    """One output for each prompt of a stream."""
    outputs = []
    for piece in pieces:
        outputs = outputs or [None] * len(piece)
        for i, output in enumerate(piece):
            if output is not None and outputs[i] is None:
                outputs[i] = output
            elif output is not None:
                outputs[i].add(output)
    return outputs


def test_text_is_the_decoded_greedy_continuation(llm: LLM, folder) -> None:
    (out,) = llm.generate(PROMPT, GREEDY)
    model = ernie.load(folder, dtype=torch.float32)
    ids = list(generate(model, llm.tokenizer.encode(PROMPT), max_tokens=24))
    assert out.outputs[0].token_ids == ids
    assert out.outputs.text == llm.tokenizer.decode(ids, skip_special=True)
    assert (out.finished, out.outputs.finish_reason, out.prompt) == (True, "length", PROMPT)
    assert out.prompt_token_ids == llm.tokenizer.encode(PROMPT)


def test_every_form_of_a_prompt_means_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    forms = [PROMPT, [PROMPT], ids, [ids], {"prompt": PROMPT}, {"prompt_token_ids": ids}]
    forms.append({"prompt": None, "prompt_token_ids": ids})
    forms += [[number(i) for i in ids] for number in (np.int64, np.uint16, torch.tensor)]
    answers = {llm.generate(form, GREEDY)[0].outputs.text for form in [*forms, [forms[4]]]}
    assert len(answers) == 1
    assert len(llm.generate([PROMPT, PROMPT, {"prompt": ids}], GREEDY)) == 3
    assert llm.generate([], GREEDY) == []


def test_a_stream_concatenates_to_the_whole(llm: LLM) -> None:
    prompts = [PROMPT, "Prices rose", "User: Hi"]
    params = SamplingParams(seed=5, max_tokens=30, n=2)
    whole = llm.generate(prompts, params)
    outputs = merged(llm.generate(prompts, params, stream=True))
    for a, b in zip(whole, outputs):
        for one, other in zip(a.outputs, b.outputs):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
            assert one.finish_reason == other.finish_reason
        assert b.finished


def test_samples_that_come_while_another_call_runs_are_one_output_each(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, n=2, temperature=1.0, seed=3)
    (whole,) = llm.generate(PROMPT, params)
    stream = llm.generate(PROMPT, params, stream=True)
    pieces = [next(stream)]
    llm.generate("Prices rose", GREEDY)
    for piece in stream:
        assert [one.index for one in piece[0].outputs] in ([0, 1], [0], [1])
        pieces.append(piece)
    assert merged(pieces)[0].outputs == whole.outputs


def test_a_stream_that_is_left_gives_everything_back(llm: LLM) -> None:
    stream = llm.generate([PROMPT] * 3, GREEDY, stream=True)
    next(stream)
    assert llm.engine.stats().num_running == 3
    stream.close()  # the fixture looks at what is left


@pytest.mark.parametrize("place", ["runner.run", "pooler"])
def test_a_stream_that_is_collected_during_a_step_harms_no_other_call(llm: LLM, place: str) -> None:
    expected = llm.generate("Prices rose", GREEDY)[0].outputs.token_ids
    owner, name = (llm.engine.runner, "run") if place == "runner.run" else (llm.engine, place)
    work = getattr(owner, name)

    def collecting(*arguments: object) -> object:
        gc.collect()
        return work(*arguments)

    gc.disable()
    try:
        holder: dict[str, object] = {"stream": llm.generate([PROMPT] * 2, GREEDY, stream=True)}
        holder["itself"] = holder
        next(holder["stream"])
        del holder
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(owner, name, collecting)
            (out,) = llm.generate("Prices rose", GREEDY)
    finally:
        gc.enable()
    assert out.outputs.token_ids == expected
    assert not llm.engine.requests


def test_what_an_output_says_of_its_times_adds_up(llm: LLM) -> None:
    times = llm.generate(PROMPT, GREEDY)[0].metrics
    began = times.arrival_time + times.time_in_queue
    assert began == pytest.approx(times.inference_start_time)
    assert times.arrival_time <= began <= times.first_token_time <= times.finished_time


def test_calls_beside_an_open_stream_take_nothing_from_it(llm: LLM) -> None:
    """Nor it from them; each reads what the engine gave for it while another one was read."""
    prompts = [PROMPT, "Prices rose"]
    whole, other = llm.generate(prompts, GREEDY), llm.generate("User: Hi", GREEDY)
    short = dataclasses.replace(GREEDY, stop=[whole[0].outputs.text[2:6]])
    vector = llm.embed(PROMPT)
    streams = [llm.generate(prompts, one, stream=True) for one in (GREEDY, short)]
    pieces: list[list] = [[], []]
    for _ in range(3):
        for stream, own in zip(streams, pieces):
            own.append(next(stream))
    assert llm.generate("User: Hi", GREEDY)[0].outputs == other[0].outputs
    assert llm.embed(PROMPT) == vector
    for stream, own in zip(reversed(streams), reversed(pieces)):
        own += stream
    for prompt, output in zip(whole, merged(pieces[0])):
        assert output.outputs == prompt.outputs
    assert merged(pieces[1])[0].outputs == llm.generate(PROMPT, short)[0].outputs


def test_a_stream_hears_of_a_pause_after_another_call(llm: LLM) -> None:
    stream = llm.generate(PROMPT, GREEDY, stream=True)
    first = next(stream)
    llm.pause()
    llm.resume()
    llm.generate("User: Hi", GREEDY)
    (output,) = merged([first, *stream])
    assert (output.finished, output.outputs.finish_reason) == (True, "abort")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_exactly_wherever_it_lies(llm: LLM, include: bool) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].outputs.text
    places = [i for i in range(1, len(text) - 3) if text.find(text[i : i + 3]) == i]
    assert len(places) > 5
    for start in places:
        stop = text[start : start + 3]
        params = SamplingParams(
            temperature=0,
            max_tokens=24,
            ignore_eos=True,
            stop=[stop, "never"],
            include_stop_str_in_output=include,
        )
        (out,) = llm.generate(PROMPT, params)
        assert out.outputs.text == text[: start + 3 if include else start], repr(stop)
        assert (out.outputs.finish_reason, out.outputs.stop_reason) == ("stop", stop)
        (streamed,) = merged(llm.generate(PROMPT, params, stream=True))
        assert streamed.outputs[0] == out.outputs[0], repr(stop)


def test_drafts_change_no_stop_string_and_no_stream(llm: LLM, folder) -> None:
    """Several tokens of a text become known in a step, and a stop string may end in any of them."""
    (whole,) = llm.generate(PROMPT, GREEDY)
    text, ids = whole.outputs.text, whole.outputs[0].token_ids
    drafting = LLM(str(folder), dtype="float32", max_model_len=128, block_size=8)

    def truth(schedule) -> None:
        for request in [part.request for part in schedule.parts if part.chooses]:
            request.draft_ids = ids[request.num_output : request.max_output - 1][:5]

    drafting.engine.drafter = truth
    for start in range(1, len(text) - 3):
        params = dataclasses.replace(GREEDY, stop=[text[start : start + 3]])
        (expected,) = llm.generate(PROMPT, params)
        (out,) = drafting.generate(PROMPT, params)
        assert out.outputs == expected.outputs, f"stop at {start}"
        pieces = list(drafting.generate(PROMPT, params, stream=True))
        assert merged(pieces)[0].outputs == expected.outputs
        assert all(len(piece[0].outputs) == 1 for piece in pieces)
    stats = drafting.engine.stats()
    assert stats.num_accepted_tokens > 0 and not drafting.engine.has_work, f"{stats}"
    assert stats.num_free_blocks == stats.num_blocks, f"{stats}"


def test_a_stop_string_does_not_count_before_min_tokens(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].outputs.text
    params = SamplingParams(
        temperature=0, max_tokens=24, min_tokens=24, ignore_eos=True, stop=text[:2]
    )
    assert llm.generate(PROMPT, params)[0].outputs.text.startswith(text[:2])


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(llm: LLM) -> None:
    free = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    at = next(i for i in range(5, 24) if free.token_ids[i] not in free.token_ids[:i])
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[free.token_ids[at]]
    )
    out = llm.generate(PROMPT, params)[0].outputs
    assert out.token_ids == free.token_ids[: at + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", free.token_ids[at])
    assert out.text == llm.tokenizer.decode(free.token_ids[:at], skip_special=True)


def test_samples_differ_and_a_seed_repeats_them_whatever_runs_beside(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=16)
    (alone,) = llm.generate(PROMPT, params)
    texts = [one.text for one in alone.outputs]
    assert len(set(texts)) == 3
    assert [one.index for one in alone.outputs] == [0, 1, 2]
    crowd = llm.generate(["a b c", PROMPT, "x"], [SamplingParams(max_tokens=40), params, GREEDY])
    assert [one.text for one in crowd[1].outputs] == texts


def test_without_a_seed_the_engine_seed_decides(folder) -> None:
    def texts(seed: int) -> list[str]:
        llm = LLM(str(folder), dtype="float32", max_model_len=64, seed=seed)
        return [
            out.outputs.text for out in llm.generate([PROMPT] * 2, SamplingParams(max_tokens=9))
        ]

    first = texts(0)
    assert first == texts(0) and first != texts(1) and first[0] != first[1]


def test_scores_are_those_of_the_model(llm: LLM, folder) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    llm.generate(PROMPT, GREEDY)  # its blocks are cached, and must not be used for scores
    (out,) = llm.generate(PROMPT, params)
    model = ernie.load(folder, dtype=torch.float32)
    ids = [*out.prompt_token_ids, *out.outputs.token_ids]
    logprobs = model.logits(ids).log_softmax(-1)
    entries = [*out.prompt_logprobs, *out.outputs.logprobs]
    assert entries[0] is None and len(entries) == len(ids)
    for position in range(1, len(ids)):
        value = entries[position][ids[position]]
        expected = logprobs[position - 1, ids[position]].item()
        assert value.logprob == pytest.approx(expected, abs=1e-4), position
        assert value.decoded_token == llm.tokenizer.decode([ids[position]])


def test_an_output_survives_its_dictionary_and_json(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=3, logprobs=2, prompt_logprobs=0)
    for output in (*llm.generate(PROMPT, params), *llm.generate(PROMPT, GREEDY)):
        for values in (output.to_dict(), json.loads(json.dumps(output.to_dict()))):
            again = RequestOutput.from_dict(values)
            assert again == output and again.outputs.text == output.outputs[0].text
        for wrong in (
            {},
            None,
            {**values, "outputs": 5},
            {**values, "prompt_logprobs": [5]},
            {**values, "finish": True},
            {**values, "metrics": {"time": 1.0}},
            {key: value for key, value in values.items() if key != "prompt"},
        ):
            with pytest.raises(ValueError, match="no RequestOutput as to_dict writes it"):
                RequestOutput.from_dict(wrong)


def test_published_import_paths_lead_here() -> None:
    for path, name, thing in (
        ("fastdeploy.entrypoints.llm", "LLM", LLM),
        ("fastdeploy.engine.sampling_params", "SamplingParams", SamplingParams),
        ("fastdeploy.engine.sampling_params", "GuidedDecodingParams", GuidedDecodingParams),
    ):
        assert getattr(importlib.import_module(path), name) is thing


def test_the_second_time_a_prompt_comes_from_the_cache(llm: LLM) -> None:
    prompt = [(7 * i) % 500 for i in range(40)]
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert first.outputs.token_ids == second.outputs.token_ids


@pytest.mark.parametrize("place", ["runner.run", "pooler"])
def test_an_interrupted_step_leaves_nothing_wrong_in_the_cache(llm: LLM, place: str) -> None:
    prompts, params = [[60 + i % 30 for i in range(40)], list(range(20, 60))], GREEDY
    llm.reset_prefix_cache()
    expected = [out.outputs.token_ids for out in llm.generate(prompts, params)]
    llm.reset_prefix_cache()
    stream = llm.generate(prompts[:1], params, stream=True)
    first = next(stream)[0]
    assert first is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    owner = llm.engine.runner if place == "runner.run" else llm.engine
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, place.rpartition(".")[2], interrupted)
        llm.generate(prompts[1], params)
    llm.engine.scheduler.check()
    (again,) = llm.generate(prompts[1], params)
    assert (again.num_cached_tokens, again.outputs.token_ids) == (0, expected[1])
    rest = merged([[first], *stream])[0]
    assert rest.outputs.token_ids == expected[0], "what was open has gone on"


def test_penalties_count_no_token_of_an_interrupted_step(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, frequency_penalty=1.0, repetition_penalty=1.2)
    expected = llm.generate(PROMPT, params)[0].outputs

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    stream = llm.generate(PROMPT, params, stream=True)
    pieces = [next(stream)]
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(llm.engine, "pooler", interrupted)
            llm.generate("Prices rose", GREEDY)
        pieces.append(next(stream))
    assert merged([*pieces, *stream])[0].outputs == expected


@pytest.mark.parametrize("most", [2, 24])
def test_tokens_of_a_step_whose_drafts_fail_are_told_by_the_next(llm: LLM, most: int) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=most)
    expected = llm.generate(PROMPT, params)[0].outputs

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    stream = llm.generate(PROMPT, params, stream=True)
    first = next(stream)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm.engine, "drafter", interrupted)
        llm.generate("Prices rose", GREEDY)
    assert len(llm.engine.news) == 1
    assert merged([first, *stream])[0].outputs == expected


def test_max_tokens_is_lowered_to_what_fits(llm: LLM) -> None:
    ids = [5] * 250
    for most in (None, 100, 2**31):
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        out = llm.generate(ids, params)[0].outputs
        assert (len(out.token_ids), out.finish_reason) == (6, "length")
    assert len(llm.generate([5] * 255, GREEDY)[0].outputs.token_ids) == 1


def test_chat_text_that_spells_control_tokens_stays_text(llm: LLM) -> None:
    end = llm.tokenizer.id_of("<|end_of_sentence|>")
    (out,) = llm.chat([{"role": "user", "content": "say <|end_of_sentence|> now"}], GREEDY)
    plain = llm.chat([{"role": "user", "content": "say now"}], GREEDY)[0]
    count = list(out.prompt_token_ids).count(end)
    assert count == list(plain.prompt_token_ids).count(end), "a user wrote a control token"
    two = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert len(llm.chat(two, GREEDY)) == 2


def test_bad_words_are_never_said(llm: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    ids = llm.generate(PROMPT, SamplingParams(**params))[0].outputs.token_ids
    words = {llm.tokenizer.decode([i]).strip() for i in ids}
    word = next(w for w in sorted(words) if len(llm.tokenizer.encode(w)) == 1)
    out = llm.generate(PROMPT, SamplingParams(**params, bad_words=[word]))[0].outputs
    assert llm.tokenizer.encode(word)[0] not in out.token_ids


def test_a_bad_word_that_spells_a_special_token_bans_the_token(llm: LLM) -> None:
    mask, x = llm.tokenizer.id_of("<mask:1>"), llm.tokenizer.encode("x")[0]
    params = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    params["logit_bias"] = {mask: 100, x: 50}
    for words, expected in (
        ([], [mask] * 6),
        (["<mask:1>"], [x] * 6),
        (["<mask:1><mask:1>"], [mask, x] * 3),
    ):
        out = llm.generate(PROMPT, SamplingParams(**params, bad_words=words))[0].outputs
        assert out.token_ids == expected, words


def test_bans_of_everything_end_the_text_as_an_error_and_harm_no_other(llm: LLM) -> None:
    size = llm.engine.vocab_size
    one, rest = {"bad_words_token_ids": [5]}, {"bad_words_token_ids": list(range(1, size))}
    every = {"bad_words_token_ids": list(range(size))}
    settings = [SamplingParams(max_tokens=4, seed=3, **bans) for bans in (every, one, rest)]
    failed, *good = llm.generate([PROMPT] * 3, settings)
    assert failed.error_code == 400 and "no token is left" in failed.error_msg
    assert (failed.outputs.finish_reason, failed.outputs.text) == ("error", "")
    assert [out.error_msg for out in good] == [None, None]
    assert good[1].outputs.token_ids == [0] * 4
    assert good[0].outputs == llm.generate(PROMPT, settings[1])[0].outputs


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["<mask:1>", "</s>"])
def test_a_stop_string_that_is_a_special_token_ends_the_text(
    llm: LLM, stop: str, include: bool
) -> None:
    bias = {llm.tokenizer.id_of(stop): 100}
    params = SamplingParams(
        temperature=0,
        max_tokens=9,
        min_tokens=3,
        logit_bias=bias,
        stop=[stop],
        include_stop_str_in_output=include,
    )
    (out,) = llm.generate(PROMPT, params)
    assert len(out.outputs.token_ids) == 3, "not before min_tokens, and then at once"
    assert (out.outputs.finish_reason, out.outputs.stop_reason) == ("stop", stop)
    assert out.outputs.text.endswith(stop) == include, out.outputs.text
    assert out.outputs.text.count(stop) == include, "one that does not stop is not shown"
    (streamed,) = merged(llm.generate(PROMPT, params, stream=True))
    assert streamed.outputs[0] == out.outputs[0]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5] * 256, {}, "the prompt has 256 tokens; max_model_len=256"),
        ([5] * 250, {"min_tokens": 10}, "the prompt has 250 tokens"),
        ([[]], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([[1, 10**6]], {}, "1000000, which is not a token id"),
        ([[1, "a"]], {}, "'a', which is not a token id"),
        ([[1, True]], {}, "True, which is not a token id"),
        ([[1, np.True_]], {}, "True_?, which is not a token id"),
        ([[1, 2.0]], {}, "2.0, which is not a token id"),
        ([[1, np.float32(2)]], {}, r"2.0\)?, which is not a token id"),
        ({"text": "x"}, {}, "it needs the key 'prompt'"),
        ({"prompt": None}, {}, "it needs the key 'prompt'"),
        ({"prompt": "x", "prompt_token_ids": [1]}, {}, "has both prompt and prompt_token_ids"),
        ({"prompt": "", "prompt_token_ids": [1]}, {}, "has both prompt and prompt_token_ids"),
        ("x", {"logprobs": -1}, "logprobs=-1 is more than max_logprobs=20"),
        ("x", {"stop_token_ids": [10**6]}, "stop_token_ids has token 1000000"),
        ("x", {"logit_bias": {10**6: 1.0}}, "logit_bias has token 1000000"),
        ("x", {"min_tokens": 6, "response_max_tokens": 2}, "more than response_max_tokens=2"),
        ({"prompt": "x", "multimodal_data": {"image": [1]}}, {}, "reads text only"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(llm: LLM, prompt, params, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, SamplingParams(**params))


def test_wrong_kinds_of_arguments(llm: LLM) -> None:
    for prompt in (5, None, [None]):
        with pytest.raises(TypeError):
            llm.generate(prompt)
    for params in ({"temperature": 0}, [{"temperature": 0}], [None], "hot", 5):
        with pytest.raises(TypeError, match="sampling_params takes a SamplingParams, or a list"):
            llm.generate("x", params)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="cannot be streamed"):
        llm.generate("x", SamplingParams(prompt_logprobs=0), stream=True)
    with pytest.raises(ValueError, match=r"messages\[0\] has the role"):
        llm.chat([{"role": "boss", "content": "x"}])
    with pytest.raises(ValueError, match="sets 'messages'"):
        llm.chat([{"role": "user", "content": "x"}], chat_template_kwargs={"messages": []})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_modl_len": 5}, "did you mean 'max_model_len'"),
        ({"max_model_len": 10**6}, "more than the 512 positions"),
        (
            {"tensor_parallel_size": 3},
            "tensor_parallel_size=3 does not divide num_key_value_heads=2",
        ),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is too small"),
        ({"num_gpu_blocks_override": 2}, "the cache has 2 blocks"),
        ({"max_num_batched_tokens": 4}, "less than max_num_seqs=8"),
        ({"dtype": "float8"}, "use one of bfloat16, float32"),
        ({"device": "abacus"}, "use cpu, cuda or auto"),
        ({"chat_template": "/no/such/file"}, "neither Jinja text nor a file"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(folder, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), **({"max_model_len": 256} | options))


def test_logprobs_have_to_be_enabled(folder) -> None:
    llm = LLM(str(folder), max_model_len=64, data_parallel_size=1)  # a flag at its default is fine
    with pytest.raises(ValueError, match="start with enable_logprob"):
        llm.generate("x", SamplingParams(logprobs=1))
