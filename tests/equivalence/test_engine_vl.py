"""At temperature 0 the engine must give the plain generator's tokens for prompts with pictures too,
however they are cut, found in the cache or computed again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_lora
from helpers_ranks import EVEN

import ernie
from ernie.adapter_files import module_shapes, products_of
from ernie.attention import Attend, packed_causal
from ernie.fused import fuse, shallow_copy
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.quant.scheme import SCHEMES
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Inputs, Processor, Span
from erniekit.lora import LoRA
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.loading import load, make_engine
from fastdeploy.engine.request import Order
from fastdeploy.errors import RequestError
from fastdeploy.llm import LLM
from fastdeploy.sampling import SamplingParams
from tests.helpers_vision import png, vl_folder

NUM_NEW, MAX_LEN, BLOCK = 24, 96, 8
SMALL, WIDE, CLIP = (1, 4, 6), (1, 4, 20), (4, 4, 8)  # 6, 20 and 16 rows
TEXTS = ([5, 9, 11, 30, 31], [(7 * i + 3) % 97 for i in range(33)])
MTP = {"method": "mtp", "num_speculative_tokens": 3}
Picture = tuple[tuple[int, int, int], int]  # its grid, and the seed of its pixels


def prompt_of(*parts: Sequence[int] | Picture) -> Inputs:
    """Token ids and pictures, in order."""
    ids: list[int] = []
    pixels, spans, num_patches = [np.zeros((0, 588), np.uint8)], [], 0
    for part in parts:
        if not isinstance(part, tuple):
            ids += part
            continue
        grid, seed = part
        t, h, w = grid
        rows = np.random.default_rng(seed).integers(0, 256, (t * h * w, 588), np.uint8)
        start, num_tokens = len(ids) + 1, max(t // 2, 1) * h * w // 4
        begin, end = (203, 204) if t > 1 else (201, 202)
        ids += [begin, *[200] * num_tokens, end]
        digest = hashlib.sha256(repr(grid).encode() + rows.tobytes()).hexdigest()
        kind = "video" if t > 1 else "image"
        spans.append(Span(kind, start, start + num_tokens, num_patches, grid, digest))
        pixels.append(rows)
        num_patches += len(rows)
    grids = np.array([span.grid for span in spans], np.int64).reshape(-1, 3)
    return Inputs(ids, [-100] * len(ids), np.concatenate(pixels), grids, tuple(spans))


# Alike but for the pixels of one picture, beginning alike, several pictures, a clip, none.
PROMPTS = (
    prompt_of([5, 9, 11], (WIDE, 1), [20, 21, 22, 23]),
    prompt_of([5, 9, 11], (WIDE, 2), [20, 21, 22, 23]),
    prompt_of([5, 9, 11], (WIDE, 1), [20, 21, 22, 23], (SMALL, 3), [40, 41]),
    prompt_of((CLIP, 4), [50, 51, 52], (SMALL, 3)),
    prompt_of([(7 * i + 3) % 97 for i in range(33)], (SMALL, 5), [60]),
)
ALL: tuple[Inputs | list[int], ...] = (PROMPTS[0], TEXTS[0], *PROMPTS[1:], TEXTS[1])
NUM_PICTURES = 5  # different ones in all prompts


@cache
def model() -> ErnieModel:
    """One whose logits are far apart, and whose pictures change them."""
    made = ErnieModel(TINY["tiny-vl"], dtype=torch.float32)
    made.init_weights(seed=1, std=0.3)
    return made


def answer_of(model: ErnieModel, prompt: Inputs | list[int]) -> list[int]:
    """The plain generator's."""
    if isinstance(prompt, list):
        return list(generate(model, prompt, max_tokens=NUM_NEW))
    pictures = {"pixel_values": prompt.pixel_values, "grid_thw": prompt.grid_thw}
    return list(generate(model, prompt.token_ids, max_tokens=NUM_NEW, **pictures))


@cache
def expected() -> list[list[int]]:
    return [answer_of(model(), prompt) for prompt in ALL]


def engine_of(fused: bool = True, **settings: Any) -> Engine:
    settings = {"block_size": BLOCK, "max_num_seqs": 8, "num_gpu_blocks_override": 200} | settings
    config = EngineConfig(model="tiny-vl", max_model_len=MAX_LEN, **settings)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    made = fuse(shallow_copy(model())) if fused else model()
    return make_engine(made, config, rebuild=fuse)


def run(
    engine: Engine, prompts: Sequence[Inputs | list[int]], preempt_after: int = 0
) -> list[list[int]]:
    """Greedy answers; all requests lose their blocks once, after a number of steps."""
    num_before = engine.num_steps
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(answers, prompts):
        engine.add(name, prompt, params)
    while engine.has_work:
        for output in engine.step():
            assert output.token is not None
            answers[output.request_id].append(output.token)
        if engine.num_steps - num_before == preempt_after:
            engine.scheduler.preempt_all()
        engine.scheduler.check()
    return list(answers.values())


def test_answers_depend_on_the_pictures() -> None:
    assert len({tuple(answer) for answer in expected()}) == len(ALL)


@pytest.mark.parametrize("num_blocks", [200, 14], ids=["enough blocks", "preempted"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("chunk", [8, 13, 512])
def test_greedy_tokens_equal_the_plain_generator(
    chunk: int, caching: bool, num_blocks: int
) -> None:
    engine = engine_of(
        max_num_batched_tokens=chunk,
        enable_prefix_caching=caching,
        num_gpu_blocks_override=num_blocks,
    )
    for _ in range(2):
        assert run(engine, ALL) == expected()
    stats = engine.stats()
    assert (stats.num_hit_tokens > 0) == caching, f"{stats}"
    assert (stats.num_preemptions > 0) == (num_blocks < 200), f"{stats}"
    assert stats.num_free_blocks == stats.num_blocks, f"blocks are held by nobody: {stats}"
    assert stats.num_pictures_computed == NUM_PICTURES  # each once, in both rounds
    if num_blocks == 200:
        # 7 places in the prompts of a round, all of them found but for the first of each picture;
        # in the second round whole blocks of the cache stand for some of them.
        found = 2 * 7 - NUM_PICTURES
        assert 0 < stats.num_picture_hits <= found
        assert caching or stats.num_picture_hits == found, f"{stats}"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"block_size": 3, "max_num_batched_tokens": 10},
        {"enable_chunked_prefill": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_change_no_token(settings: dict[str, Any]) -> None:
    engine = engine_of(**settings)
    for _ in range(2):
        assert run(engine, ALL) == expected()


@pytest.mark.parametrize("scheme", ["wint8", "wint4"])
def test_integer_weights_give_the_tokens_of_the_generator_on_them(scheme: str) -> None:
    """What these weights stand for is compared in `tests/ernie/test_fused.py`."""
    made = fuse(shallow_copy(model()), SCHEMES[scheme])
    wanted = [answer_of(made, prompt) for prompt in ALL]
    assert wanted != expected(), "nothing was quantised"
    settings = {"block_size": BLOCK, "num_gpu_blocks_override": 200, "max_num_batched_tokens": 13}
    config = EngineConfig(model="tiny-vl", max_model_len=MAX_LEN, **settings)
    engine = make_engine(made, config.resolved(max_positions=MAX_LEN, device_type="cpu"))
    assert run(engine, ALL) == wanted


def test_the_plain_form_of_the_model_gives_the_same() -> None:
    assert run(engine_of(fused=False), ALL) == expected()


def test_rows_that_find_no_room_are_computed_again_but_not_within_a_picture() -> None:
    engine = engine_of(max_num_batched_tokens=4, max_num_seqs=1, enable_prefix_caching=False)
    assert engine.pictures is not None
    engine.pictures.max_bytes = 0
    for _ in range(2):
        assert run(engine, [PROMPTS[0], PROMPTS[3]]) == [expected()[0], expected()[4]]
    assert engine.pictures.num_computed == 2 * 3
    assert engine.pictures.num_bytes == 0, "rows are kept beyond the limit"


def test_a_picture_whose_tokens_are_in_the_prefix_cache_is_not_computed() -> None:
    engine = engine_of()
    assert engine.pictures is not None
    assert run(engine, [PROMPTS[0]]) == expected()[:1]
    engine.pictures.forget()
    # Three full blocks hold the picture to its last token; the fourth is not full.
    assert run(engine, [PROMPTS[0]]) == expected()[:1]
    assert engine.stats().num_hit_tokens == 24
    assert engine.pictures.num_computed == 1


def test_what_was_made_of_a_picture_is_found_by_its_salt_alone() -> None:
    """So no tenant learns, by timing, what pictures others have sent."""
    engine = engine_of(enable_prefix_caching=False)
    assert engine.pictures is not None
    params = SamplingParams(temperature=0, max_tokens=1)
    for number, (salt, num_computed) in enumerate([("a", 1), ("b", 2), (None, 3), ("b", 3)]):
        engine.add(str(number), PROMPTS[0], params, Order(cache_salt=salt))
        while engine.has_work:
            engine.step()
        assert engine.pictures.num_computed == num_computed
    assert engine.pictures.num_hits == 1


def test_pictures_with_other_pixels_share_no_block() -> None:
    engine = engine_of()
    same, other = PROMPTS[0], PROMPTS[1]
    assert same.token_ids == other.token_ids
    run(engine, [same])
    assert run(engine, [other]) == [expected()[2]]
    assert engine.stats().num_hit_tokens == 0  # the first block holds the beginning of the picture


@pytest.mark.parametrize("preempt_after", [1, 2, 3, 9])
def test_requests_that_lose_their_blocks_within_a_picture_go_on(preempt_after: int) -> None:
    engine = engine_of(max_num_batched_tokens=9)
    assert run(engine, ALL, preempt_after) == expected()
    assert engine.stats().num_preemptions > 0


def test_pictures_are_read_with_the_new_weights_after_an_update(tmp_path: Path) -> None:
    changed = ErnieModel(TINY["tiny-vl"], dtype=torch.float32)
    changed.init_weights(seed=2, std=0.3)
    ernie.save(changed, tmp_path)
    engine = engine_of()
    run(engine, [PROMPTS[0]])
    engine.update_weights(tmp_path)
    assert run(engine, [PROMPTS[0]]) == [answer_of(changed, PROMPTS[0])] != expected()[:1]


# --- with adapters ---

PAIRS = {
    "all": LoRA(4, 12.0),
    "text experts": LoRA(3, 12.0, targets=("mlp.experts",)),
    "vision experts": LoRA(3, 12.0, targets=("vision_experts.gate_up_proj", "q_proj")),
    "shared": LoRA(2, 8.0, targets=("shared_experts.down_proj", "v_proj")),
}


@cache
def adapted() -> tuple[dict[str, ErnieModel], dict[str, list[list[int]]]]:
    """The wrapped models, and the answers of the base and of the merged models."""
    wrapped = {
        a: helpers_lora.trained(model(), pair, i) for i, (a, pair) in enumerate(PAIRS.items())
    }
    answers = {a: helpers_lora.merged(made) for a, made in wrapped.items()}
    return wrapped, {
        "base": expected(),
        **{a: [answer_of(made, prompt) for prompt in ALL] for a, made in answers.items()},
    }


@pytest.mark.parametrize("chunk", [11, 512])
def test_prompts_of_several_adapters_equal_the_merged_models(chunk: int, tmp_path: Path) -> None:
    """The base and four adapters side by side, with and without pictures in the same steps."""
    wrapped, answers = adapted()
    settings: dict[str, Any] = {"enable_lora": True, "max_num_batched_tokens": chunk}
    engine = engine_of(num_gpu_blocks_override=400, **settings)
    for name, made in wrapped.items():
        folder = helpers_lora.save(made, PAIRS[name], tmp_path / name)
        engine.load_adapter(name, engine.adapters.read(folder))
    check_adapters(engine, answers)
    assert engine.stats().num_pictures_computed == NUM_PICTURES  # whatever the adapter


def check_adapters(engine: Engine, answers: dict[str, list[list[int]]]) -> None:
    """Ask for all answers at the same time."""
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    got: dict[str, list[list[int]]] = {name: [[] for _ in ALL] for name in answers}
    for i, prompt in enumerate(ALL):
        for name in answers:
            adapter = None if name == "base" else engine.adapters.get(name)
            engine.add(f"{i}/{name}", prompt, params, adapter=adapter)
    while engine.has_work:
        for output in engine.step():
            i, _, name = output.request_id.partition("/")
            got[name][int(i)].append(output.token)
        engine.scheduler.check()
    for name, wanted in answers.items():
        assert got[name] == wanted, name


def test_the_adapters_of_the_table_change_answers_about_pictures() -> None:
    _, answers = adapted()
    for i, prompt in enumerate(ALL):
        told = {tuple(answers[name][i]) for name in answers}
        # Experts of vision have no part in a text.
        assert len(told) == len(answers), f"{i}: {prompt}"


@pytest.mark.parametrize("name", TINY)
def test_every_module_that_an_adapter_may_change_is_part_of_one_product(name: str) -> None:
    config = TINY[name]
    layers = range(config.num_hidden_layers)
    parts = [m for layer in layers for ms in products_of(config, layer).values() for m in ms]
    shapes = module_shapes(config)
    assert sorted(part for part in parts if part in shapes) == sorted(shapes)


# --- with drafts ---


@pytest.mark.parametrize("chunk", [9, 512])
def test_mtp_drafts_behind_pictures_are_the_blocks_own(chunk: int) -> None:
    made = ErnieModel(replace(TINY["tiny-vl"], num_nextn_predict_layers=1), dtype=torch.float32)
    made.init_weights(seed=1, std=0.3)
    config = EngineConfig(
        model="tiny-vl",
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        num_gpu_blocks_override=200,
        max_num_batched_tokens=chunk,
        speculative_config=MTP,
    )
    engine = make_engine(made, config.resolved(max_positions=MAX_LEN, device_type="cpu"))
    mtp, inputs = engine.drafter, {str(i): prompt for i, prompt in enumerate(ALL)}
    truth = {name: answer_of(made, prompt) for name, prompt in inputs.items()}
    lengths: Counter[int] = Counter()

    def drafter(schedule: Any) -> None:
        assert mtp is not None
        mtp(schedule)
        for part in schedule.parts:
            request, drafts = part.request, part.request.draft_ids
            prompt = inputs[request.id]
            if drafts:
                assert drafts == plain_drafts(made, prompt, request.token_ids, len(drafts))
            lengths[len(drafts)] += 1
            if drafts and request.num_output % 2:  # the truth, so that some are accepted
                said = truth[request.id][request.num_output :][: len(drafts)]
                request.draft_ids = said

    engine.drafter = drafter
    for _ in range(2):
        assert run(engine, ALL) == [*truth.values()]
    stats = engine.stats()
    assert stats.num_accepted_tokens > 0 and lengths[3] > 20, f"{stats} {lengths}"
    assert stats.num_hit_tokens > 0


@torch.no_grad()
def plain_drafts(
    model: ErnieModel, prompt: Inputs | list[int], token_ids: list[int], count: int
) -> list[int]:
    """What the MTP block drafts after `token_ids`, computed from the first token on."""
    if isinstance(prompt, Inputs):
        known = model.prompt(prompt.token_ids, prompt.pixel_values, prompt.grid_thw)
    else:
        known = model.prompt(prompt)
    num_prompt, length = len(known.token_ids_T), len(token_ids) - 1
    # What follows the prompt is text, also where it spells a marker.
    behind = known.positions.max() + 1 + torch.arange(length + count - num_prompt)
    positions = torch.cat((known.positions, behind.expand(3, -1)), -1)
    assert known.modality_T is not None
    modality_T = torch.nn.functional.pad(known.modality_T, (0, length - num_prompt))
    ids_T = torch.tensor(token_ids[:-1])
    known = known._replace(
        token_ids_T=ids_T, positions=positions[:, :length], modality_T=modality_T
    )

    def whole(length: int) -> Attend:
        return packed_causal(torch.tensor([0, length], dtype=torch.int32))

    hidden_TD, successors, drafts = model.read(known, whole(length)), token_ids[1:], []
    for i in range(length, length + count):
        out_TD = model.hidden_after_next(
            torch.tensor(successors), hidden_TD, positions[:, :i], whole(i)
        )
        drafts.append(int(model.head(out_TD[-1:]).argmax()))
        hidden_TD = torch.cat((hidden_TD, out_TD[-1:]))
        successors = [*successors, drafts[-1]]
    return drafts


# --- with ranks ---


@pytest.mark.ranks
@pytest.mark.parametrize("chunk", [13, 512])
def test_two_ranks_give_the_same_tokens(chunk: int, tmp_path: Path) -> None:
    made = ErnieModel(EVEN["even-vl"], dtype=torch.float32)
    made.init_weights(seed=1, std=0.3)
    with shared(made, tmp_path, max_num_batched_tokens=chunk) as engine:
        for _ in range(2):
            assert run(engine, ALL) == [answer_of(made, prompt) for prompt in ALL]
        assert engine.stats().num_pictures_computed == NUM_PICTURES
        made.init_weights(seed=2, std=0.3)
        ernie.save(made, tmp_path / "other")
        engine.update_weights(tmp_path / "other")
        assert run(engine, ALL) == [answer_of(made, prompt) for prompt in ALL]


@pytest.mark.ranks
def test_two_ranks_with_adapters_and_drafts_give_the_merged_models_tokens(tmp_path: Path) -> None:
    """Both banks of experts changed, in steps with and without pictures; new weights under them."""
    settings = {"enable_lora": True, "speculative_config": MTP, "max_num_batched_tokens": 13}
    made, names = ErnieModel(EVEN["even-vl"], dtype=torch.float32), ("text experts", "all")
    made.init_weights(seed=1, std=0.3)
    with shared(made, tmp_path, **settings) as engine:
        for name, wrapped in wrapped_by(names, made).items():
            folder = helpers_lora.save(wrapped, PAIRS[name], tmp_path / name)
            engine.load_adapter(name, engine.adapters.read(folder))
        check_adapters(engine, answers_by(names, made))
        made.init_weights(seed=2, std=0.3)
        ernie.save(made, tmp_path / "other")
        engine.sleep(2)
        engine.wake_up(tmp_path / "other")
        check_adapters(engine, answers_by(names, made))
        assert engine.stats().num_draft_tokens > 0


def wrapped_by(names: Sequence[str], model: ErnieModel) -> dict[str, ErnieModel]:
    """The pairs are the same whatever the model."""
    return {name: helpers_lora.trained(model, PAIRS[name], 7) for name in names}


def answers_by(names: Sequence[str], model: ErnieModel) -> dict[str, list[list[int]]]:
    """Those of the model, and with each of the adapters merged."""
    models = {"base": model}
    models |= {n: helpers_lora.merged(w) for n, w in wrapped_by(names, model).items()}
    return {name: [answer_of(one, prompt) for prompt in ALL] for name, one in models.items()}


@contextlib.contextmanager
def shared(model: ErnieModel, folder: Path, **settings: Any) -> Iterator[Engine]:
    """An engine of two ranks, which read the model from `folder`."""
    ernie.save(model, folder)
    options = {"dtype": "float32", "max_model_len": MAX_LEN, "block_size": BLOCK}
    options |= {"num_gpu_blocks_override": 200, "tensor_parallel_size": 2} | settings
    engine = load(EngineConfig(model=str(folder), **options)).engine
    assert engine.ranks is not None
    try:
        yield engine
    finally:
        engine.ranks.stop()


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([1, 201, 200, 200, 202], "2 placeholder tokens are left"),
        (replace(PROMPTS[0], pixel_values=PROMPTS[0].pixel_values[:-1]), "the grids ask for"),
        (replace(PROMPTS[0], token_ids=PROMPTS[0].token_ids[3:]), "are not where"),
        (replace(PROMPTS[0], token_ids=TEXTS[1]), "needs 20 placeholder tokens"),
    ],
)
def test_tokens_and_pictures_that_do_not_belong_together_are_refused(
    prompt: Inputs | list[int], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        engine_of().check(prompt, SamplingParams())


def test_a_text_model_refuses_pictures() -> None:
    made = ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    made.init_weights(seed=1)
    config = EngineConfig(model="tiny-dense", num_gpu_blocks_override=20, max_model_len=64)
    engine = make_engine(made, config.resolved(max_positions=64, device_type="cpu"))
    with pytest.raises(RequestError, match="text model"):
        engine.check(replace(PROMPTS[0], token_ids=[7] * 19), SamplingParams())


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The tiny network with the vocabulary of a tokenizer."""
    folder = vl_folder(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.from_folder(folder)
    marks = {
        f"{kind}_{end}_token_id": tokenizer.id_of(f"<|{kind.upper()}_{end.upper()}|>")
        for kind in ("image", "video")
        for end in ("start", "end")
    }
    mark = tokenizer.id_of("<|IMAGE_PLACEHOLDER|>")
    config = replace(
        TINY["tiny-vl"],
        vocab_size=tokenizer.vocab_size,
        im_patch_id=mark,
        video_token_id=None,
        **marks,
    )
    made = ErnieModel(config, dtype=torch.float32)
    made.init_weights(seed=1, std=0.3)
    settings = {"max_model_len": 400, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 16}
    return LLM(made, tokenizer=str(folder), **settings)


PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# As the template writes the messages below.
WRITTEN = (
    "<|begin_of_sentence|>User: What?Picture 1:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
)


def test_chat_with_a_picture_equals_the_plain_generator(llm: LLM) -> None:
    url = "data:image/png;base64," + base64.b64encode(png("teal")).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]
    assert llm.template is not None and llm.tokenizer is not None
    inputs = Processor().inputs(llm.template, llm.tokenizer, messages, add_generation_prompt=True)
    (output,) = llm.chat(messages, PARAMS)
    assert output.prompt_token_ids == inputs.token_ids
    wanted = generate(
        llm.engine.runner.model,
        inputs.token_ids,
        max_tokens=8,
        pixel_values=inputs.pixel_values,
        grid_thw=inputs.grid_thw,
    )
    assert output.outputs.token_ids == list(wanted)


def test_pictures_of_a_prompt_are_the_same_however_they_are_given(llm: LLM, tmp_path: Path) -> None:
    data = png("teal")
    path = tmp_path / "teal.png"
    path.write_bytes(data)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(
        WRITTEN.replace("image@placeholder", "IMAGE_PLACEHOLDER"), allow_special=True
    )
    given = [
        {"prompt": WRITTEN, "multimodal_data": {"image": [data]}},
        {"prompt": WRITTEN, "multi_modal_data": {"image": Image.open(path)}},
        {"prompt": WRITTEN, "multi_modal_data": {"image": [str(path)]}},
        {"prompt_token_ids": ids, "multimodal_data": {"image": [path]}},
    ]
    assert llm.engine.pictures is not None
    llm.engine.pictures.forget()
    before = llm.engine.pictures.num_computed
    outputs = llm.generate(given, PARAMS)
    assert llm.engine.pictures.num_computed - before <= 1
    assert len({tuple(output.outputs.token_ids) for output in outputs}) == 1
    whole = outputs[0].prompt_token_ids
    again = {"prompt_token_ids": whole, "multimodal_data": {"image": [data]}}
    assert llm.generate(again, PARAMS)[0].prompt_token_ids == whole


def test_a_clip_of_a_prompt_stands_in_its_place(llm: LLM) -> None:
    prompt = (
        "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|> and "
        "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
    )
    clip = {"video": [png(c) for c in ("red", "teal")], "max_pixels": 28 * 28 * 8}
    clip["min_pixels"] = 28 * 28
    data = {"image": [png()], "video": [clip]}
    item = llm._item({"prompt": prompt, "multimodal_data": data})
    assert isinstance(item.prompt, Inputs)
    assert [span.kind for span in item.prompt.pictures] == ["video", "image"]
    ids = llm._item({"prompt_token_ids": item.token_ids, "multimodal_data": data})
    assert ids.token_ids == item.token_ids
    assert len(llm.generate({"prompt": prompt, "multimodal_data": data}, PARAMS)) == 1


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"prompt": "x", "multimodal_data": {"image": [b""]}}, "0 places of kind image, and 1"),
        ({"prompt": WRITTEN, "multimodal_data": {"image": [b"no"]}}, r"image\[0\]: the picture"),
        ({"prompt": WRITTEN, "multimodal_data": {"image": ["gone.png"]}}, "cannot be read"),
        ({"prompt": WRITTEN, "multimodal_data": {"sound": [1]}}, "takes the keys"),
        ({"prompt": WRITTEN, "multimodal_data": [1]}, "multimodal_data is list"),
    ],
)
def test_pictures_of_a_prompt_that_are_wrong_are_refused(
    llm: LLM, prompt: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        llm.generate(prompt, PARAMS)
