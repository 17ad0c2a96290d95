"""Judged answers about pictures: rows are those of two plain dialogues, losses and gradients those
of transformers on each dialogue by itself, packed or apart; and runs of every stage that judges.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeForConditionalGeneration, PreTrainedModel

import ernie
from ernie.chat import UNTRAINED, ChatTemplate
from ernie.model import ErnieModel
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Inputs, Processor
from ernie.vision.settings import VisionSettings
from ernie.vision.sources import Sources
from ernie.vision.vit import normalised
from erniekit import reward_model
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.batch import batch_of
from erniekit.data.dialogue import Sample
from erniekit.data.judged import JudgedSample
from erniekit.data.pack import Cursor
from erniekit.data.preference import PairSample
from erniekit.data.stream import stream
from erniekit.device_batch import to_device
from erniekit.kto import Usual, judged_log_probs, kto
from erniekit.preference import preference
from erniekit.reward_model import RewardModel, add_reward_head, bradley_terry
from tests.equivalence.test_vl_model import gradients_by_our_names
from tests.erniekit.conftest import write_lines
from tests.helpers_vision import png

CPU = torch.device("cpu")
# Pictures and question of a prompt, and two answers; the third asks the same about another picture.
PAIRS = [
    (["red"], "<image>What is it?", "A colour.", "It is nothing that I know of."),
    (["blue", "red"], "Is <image> like <image>, or not?", "Not much.", "It is."),
    (["green"], "<image>What is it?", "A colour.", "It is nothing that I know of."),
    ([], "Say one.", "One.", "Two, or three."),
]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for color, size in (("red", (60, 90)), ("blue", (120, 60)), ("green", (60, 90))):
        (folder / f"{color}.png").write_bytes(png(color, size))
    return folder


def settings(model: Path, media: Path, stage: str, records: list[dict]) -> dict[str, object]:
    return {
        "model_name_or_path": str(model), "stage": stage, "max_seq_len": 512,
        "train_dataset_path": str(write_lines(media / f"{stage}.jsonl", records)),
        "train_dataset_type": "erniekit", "min_pixels": 784, "max_pixels": 4704,
        "mix_strategy": "concat", "random_shuffle": False, "fine_tuning": "Full",
        **({} if stage in ("VL-SFT", "RM") else {"mask_out_eos_token": False}),
    }  # fmt: skip


def pictured(names: list[str]) -> dict:
    return {"images": [f"{name}.png" for name in names]} if names else {}


def pair_records() -> list[dict]:
    return [
        {"src": [question], "response": [[other], [answer]], "sort": [0, 1], **pictured(names)}
        for names, question, answer, other in PAIRS
    ]


def judged_records() -> list[dict]:
    return [
        {"src": [question], "response": answer, "label": i % 2 == 0, **pictured(names)}
        for i, (names, question, answer, _) in enumerate(PAIRS)
    ]


def samples_of(model: Path, media: Path, stage: str, records: list[dict]) -> list:
    data = stream(run_from(settings(model, media, stage, records)), "train")
    return [sample for i in range(len(records)) for sample in data.read(0, i)]


def dialogues(model: Path, media: Path) -> list[Sample]:
    """Chosen and rejected answer of each pair, as stage VL-SFT reads them."""
    records = [
        {"query": question, "response": text, **pictured(names)}
        for names, question, *answers in PAIRS
        for text in answers
    ]
    return samples_of(model, media, "VL-SFT", records)


def sides(pair: PairSample) -> list[tuple]:
    """What the model sees of either answer: ids, labels, positions, kinds, places and pictures."""
    assert pair.media is not None
    found = []
    for start, stop in ((pair.chosen, pair.rejected), (pair.rejected, len(pair))):
        own = np.r_[0 : pair.chosen, start:stop]
        found.append((
            np.array(pair.token_ids)[own].tolist(), np.array(pair.labels)[own].tolist(),
            pair.media.positions_3T[:, own].tolist(), pair.media.modality_T[own].tolist(),
            pair.media.is_place_T[own].tolist(), [p.digest for p in pair.media.pictures],
        ))  # fmt: skip
    return found


def test_both_sides_of_a_row_are_the_dialogues_that_sft_reads(tiny, media: Path) -> None:
    model = tiny("tiny-vl")
    pairs = samples_of(model, media, "DPO", pair_records())
    expected = [
        (
            list(s.token_ids), list(s.labels), s.media.positions_3T.tolist(),
            s.media.modality_T.tolist(), s.media.is_place_T.tolist(),
            [p.digest for p in s.media.pictures],
        )
        for s in dialogues(model, media)
    ]  # fmt: skip
    assert [side for pair in pairs for side in sides(pair)] == expected
    assert pairs[0].token_ids == pairs[2].token_ids and pairs[0].key != pairs[2].key


def test_pictures_of_a_later_question_belong_to_their_own_answer(tiny, media: Path) -> None:
    """Also where their tokens are the same, and only pixels tell."""
    red, green = ({"type": "image", "image": f"{name}.png"} for name in ("red", "green"))
    text = {"type": "text", "text": "And this?"}

    def way(part: dict) -> list[dict]:
        answer = {"role": "assistant", "content": "One."}
        return [{**answer, "label": 0}, {"role": "user", "content": [part, text]}, answer]

    record = {
        "prompt": [{"role": "user", "content": [red, text]}], "chosen": way(red),
        "rejected": way(green),
    }  # fmt: skip
    values = settings(tiny("tiny-vl"), media, "DPO", [record])
    (pair,) = stream(run_from(values | {"train_dataset_type": "messages"}), "train").read(0, 0)
    digests = [p.digest for p in pair.media.pictures]
    assert digests[0] == digests[1] != digests[2]
    sizes = [p.num_tokens for p in pair.media.pictures]
    assert pair.media.is_place_T.sum() == sum(sizes)
    assert pair.media.is_place_T[: pair.chosen].sum() == sizes[0]


@pytest.fixture
def both(tiny, tmp_path: Path) -> tuple[PreTrainedModel, ErnieModel, Path]:
    """Transformers' model and ours with the same weights, and the folder with the tokenizer."""
    ours = ernie.load(tiny("tiny-vl"), dtype=torch.float32)
    ernie.save(ours, tmp_path / "theirs", layout="transformers")
    theirs = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32
    )
    theirs.set_experts_implementation("eager")
    return theirs.eval(), ours, tiny("tiny-vl")


def plain(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Log-probability of the labels of one dialogue by transformers."""
    assert sample.media is not None
    ids, labels = torch.tensor(sample.token_ids), torch.tensor(sample.labels)
    inputs = {
        "input_ids": ids[None],
        "mm_token_type_ids": torch.from_numpy(sample.media.is_place_T).long()[None],
        "moe_mm_token_type_ids": torch.from_numpy(sample.media.modality_T)[None],
    }
    if pictures := sample.media.pictures:
        rows = torch.from_numpy(np.concatenate([p.rows for p in pictures]))
        inputs |= {
            "pixel_values": normalised(rows),
            "image_grid_thw": torch.tensor([p.grid for p in pictures]),
        }
    kept = labels != UNTRAINED
    logits = model(**inputs).logits[0][kept]
    return logits.log_softmax(-1).gather(-1, labels[kept][:, None]).double().sum()


def agree(theirs: PreTrainedModel, ours: ErnieModel, bound: float = 1e-3) -> None:
    """Gradients of every parameter that their model trains."""
    expected = gradients_by_our_names(theirs)
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        gap = (found[name] - want) / want.abs().max().clamp(min=1e-12)
        worst, bias = gap.abs().max().item(), gap.mean().item()
        assert worst < bound, f"{name} is off by {worst:.2e}, relative to its largest value"
        assert abs(bias) < bound / 10, f"{name} is biased by {bias:.2e}"


def batches(samples: list, cut: list[list[int]]) -> list:
    return [to_device(batch_of([[samples[i] for i in part]], Cursor()), CPU) for part in cut]


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[0], [1], [2], [3]]], ids=["packed", "apart"])
def test_loss_of_pairs_and_its_gradients_equal_transformers(both, media: Path, cut: list) -> None:
    theirs, ours, folder = both
    policy_P2 = torch.stack([plain(theirs, s) for s in dialogues(folder, media)]).view(-1, 2)
    reference_P2 = policy_P2.detach() + torch.linspace(-3, 4, 8).view(4, 2)
    gain_P2 = policy_P2 - reference_P2
    wanted = -torch.nn.functional.logsigmoid(0.1 * (gain_P2[:, 0] - gain_P2[:, 1])).mean()
    wanted.backward()
    pairs = samples_of(folder, media, "DPO", pair_records())
    value = 0.0
    for part, batch in zip(cut, batches(pairs, cut)):
        loss = preference(ours, batch, reference_P2[part], scale=1 / 4)
        loss.total.backward()
        value += float(loss.value)
    assert value == pytest.approx(float(wanted.detach()), rel=1e-5)
    agree(theirs, ours)


def test_loss_of_judged_answers_and_its_gradients_equal_transformers(both, media: Path) -> None:
    theirs, ours, folder = both
    judged = samples_of(folder, media, "KTO", judged_records())
    (batch,) = batches(judged, [[0, 1, 2, 3]])
    policy_S = torch.stack([plain(theirs, sample) for sample in judged])
    with torch.no_grad():
        others_S = torch.stack([plain(theirs, sample.other) for sample in judged])
        found = judged_log_probs(ours, batch)
    assert float((found[:, 1] - others_S).abs().max()) < 1e-3
    reference_S, z = policy_S.detach() + torch.tensor([1.0, -2.0, 0.5, -0.5]), torch.tensor(0.3)
    sign_S = torch.tensor([1.0 if sample.is_desirable else -1.0 for sample in judged])
    wanted = (1 - torch.sigmoid(0.1 * sign_S * (policy_S - reference_S - z))).mean()
    wanted.backward()
    loss = kto(ours, batch, reference_S, scale=1 / 4, usual=Usual(z, 2, 2))
    loss.total.backward()
    assert float(loss.value) == pytest.approx(float(wanted.detach()), rel=1e-5)
    agree(theirs, ours)


def test_an_answer_stands_after_the_prompt_of_another_picture(tiny, media: Path) -> None:
    """Prompts of the same words are two where their pictures differ."""
    judged: list[JudgedSample] = samples_of(tiny("tiny-vl"), media, "KTO", judged_records()[::2])
    first, second = judged
    assert first.token_ids == second.token_ids and first.key != second.key
    assert first.other is not None and first.other.media is not None
    assert first.other.media.mark == first.mark != second.mark, "its own picture, not the other's"


def test_rewards_do_not_depend_on_what_a_pair_is_packed_with(both, media: Path) -> None:
    _, ours, folder = both
    add_reward_head(ours, seed=1)
    pairs = samples_of(folder, media, "RM", pair_records())
    found = {}
    for name, cut in (("packed", [[0, 1, 2, 3]]), ("apart", [[0], [1], [2], [3]])):
        ours.zero_grad()
        losses = [bradley_terry(ours, batch, scale=1 / 4) for batch in batches(pairs, cut)]
        sum(loss.total for loss in losses).backward()  # type: ignore[union-attr]
        margin = sum(float(loss.parts["rewards_margin"]) for loss in losses)
        found[name] = (
            margin,
            {n: p.grad for n, p in ours.named_parameters() if p.grad is not None},
        )
    (a, grads), (b, others) = found.values()
    assert a == pytest.approx(b, rel=1e-4) and grads.keys() == others.keys()
    for name, want in grads.items():
        worst = float((others[name] - want).abs().max() / want.abs().max().clamp(min=1e-12))
        assert worst < 1e-4, f"{name} is off by {worst:.2e}"


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_loaded_reward_model_scores_answers_about_pictures(
    tiny, media: Path, tmp_path: Path, fine_tuning: str
) -> None:
    """As the evaluation of its training did, within bfloat16; however they are packed."""
    values = settings(tiny("tiny-vl"), media, "RM", pair_records()) | {
        "eval_dataset_path": media / "RM.jsonl", "evaluation_strategy": "steps", "eval_steps": 6,
        "output_dir": tmp_path, "max_steps": 6, "learning_rate": 1e-2, "device": "cpu",
        "lr_scheduler_type": "constant", "fine_tuning": fine_tuning, "disable_tqdm": True,
    }  # fmt: skip
    values["eval_dataset_type"] = "erniekit"
    assert main(["train", *(f"{k}={v}" for k, v in values.items())]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if "eval_rewards_margin" in r][-1]
    score = reward_model.load(tmp_path)
    whole = inputs_of(score.model.tokenizer, tiny("tiny-vl"), media)
    found = score(whole)
    chosen, rejected = torch.tensor(found).view(-1, 2).unbind(1)
    margin = float((chosen - rejected).mean())
    assert margin == pytest.approx(last["eval_rewards_margin"], rel=0.05)
    for max_tokens in (1, 90):
        apart = dataclasses.replace(score, max_tokens=max_tokens)(whole)
        assert apart == pytest.approx(found, rel=1e-2, abs=1e-2 * max(map(abs, found)))
    red, green = found[:2], found[4:6]  # the same words about another picture
    assert max(abs(a - b) for a, b in zip(red, green)) > 1e-3
    ids = whole[-1].token_ids
    assert score([ids]) == pytest.approx(found[-1:], rel=1e-2), "a dialogue of text alone"


def inputs_of(tokenizer: Tokenizer, model: Path, media: Path) -> list[Inputs]:
    """Chosen and rejected dialogue of each pair, made of its messages and files."""
    changed = VisionSettings.from_folder(model).changed(
        {"image_min_pixels": 784, "image_max_pixels": 4704}
    )
    processor = Processor(settings=changed, sources=Sources(folder=media))
    template = ChatTemplate.for_folder(model, tokenizer)
    found = []
    for names, question, *answers in PAIRS:
        pictures = iter(names)
        parts = [
            {"type": "image", "image": f"{next(pictures)}.png"} if piece == "<image>"
            else {"type": "text", "text": piece}
            for piece in re.split("(<image>)", question) if piece
        ]  # fmt: skip
        for text in answers:
            messages = [
                {"role": "user", "content": parts}, {"role": "assistant", "content": text}
            ]  # fmt: skip
            found.append(
                processor.inputs(template, tokenizer, messages, add_generation_prompt=False)
            )
    return found


def test_pictures_for_a_reward_model_of_text_are_refused(tiny, media: Path) -> None:
    model = ernie.load(tiny("tiny-moe"))
    add_reward_head(model, seed=0)
    seen = ernie.load(tiny("tiny-vl"))
    with pytest.raises(ValueError, match="text"):
        RewardModel(model)(inputs_of(seen.tokenizer, tiny("tiny-vl"), media))


@pytest.mark.parametrize(
    ("stage", "fine_tuning"), [("DPO", "Full"), ("DPO", "LoRA"), ("KTO", "LoRA"), ("RM", "Full")]
)
def test_runs_begin_at_chance_and_move(
    tiny, media: Path, tmp_path: Path, stage: str, fine_tuning: str
) -> None:
    records = judged_records() if stage == "KTO" else pair_records()
    values = settings(tiny("tiny-vl"), media, stage, records) | {
        "output_dir": tmp_path, "max_steps": 3, "learning_rate": 1e-2, "device": "cpu",
        "lr_scheduler_type": "constant", "fine_tuning": fine_tuning, "save_strategy": "no",
        "batch_size": 1, "dataloader_num_workers": 1,
    }  # fmt: skip
    assert main(["train", *(f"{k}={v}" for k, v in values.items())]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, *_, last = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    if stage != "RM":
        assert first == pytest.approx(math.log(2) if stage == "DPO" else 0.5, rel=1e-5)
    assert math.isfinite(last) and last != first


def test_limits_of_pictures_for_a_model_that_reads_none_are_refused(
    tiny, media, tmp_path, capsys
) -> None:
    values = settings(tiny("tiny-moe"), media, "DPO", pair_records()[3:])
    assert main(["train", *(f"{k}={v}" for k, v in values.items()), f"output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "min_pixels, max_pixels are about pictures" in error, error
