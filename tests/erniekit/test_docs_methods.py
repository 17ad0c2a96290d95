"""The pages of docs/methods: settings are a run, what they name exists, tables are ours."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from erniekit import config, foreign
from erniekit.build import _PARTS as PARTS
from erniekit.config import run_from
from erniekit.config.checks import FREEZE_WORDS
from erniekit.config.methods import LOSS_TYPES
from erniekit.config.stages import TRAINABLE
from erniekit.rewards import Rewards, judged

ROOT = Path(__file__).parents[2]
PAGES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "rm": "RM", "vl": "VL-SFT", "upo": "UPO"}
RECORDED = {
    "rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected", "preference_loss",
    "sft_loss", "eval_loss", "moe_max_over_mean", "moe_vision_max_over_mean",
}  # fmt: skip


def text_of(page: str) -> str:
    return (ROOT / f"docs/methods/{page}.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_a_run_and_every_key_that_is_named_exists(page: str) -> None:
    text = text_of(page)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    run = run_from(yaml.safe_load(block))
    assert run.model.stage == PAGES[page] and not run.without_effect
    for path in (*run.data.train_dataset_path, *run.data.eval_dataset_path):
        assert (ROOT / path).is_file(), path
    for folder in re.findall(r"`(examples/configs/[\w./-]+)`", text):
        assert list((ROOT / folder).glob("run_*.yaml")), folder
    keys = {f.name for kind in config.GROUPS for f in dataclasses.fields(kind)}
    known = keys | RECORDED | foreign.WITHOUT_EFFECT.keys() | LOSS_TYPES.keys()
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    known |= (
        PARTS.keys()
        | {*FREEZE_WORDS}
        | {"kto_en_demo", "kto_tag", "reward_head", "no_mask", "topk_gate", "reasoning_gym"}
        | {"needle_haystack"}
    )
    assert named <= known, named - known


def test_the_records_of_the_page_about_rewards_are_right_by_its_own_reward() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text_of("upo"), re.M | re.S)
    run = run_from(yaml.safe_load(block))
    records = [json.loads(line) for line in (ROOT / run.data.train_dataset_path[0]).open()]
    rewards = Rewards(run.policy)
    for i, record in enumerate(records):
        whole = judged(record, record["messages"], run.policy.reward)
        texts = [record["messages"][-1]["content"], "Something else."]
        found = rewards([whole] * 2, texts, [[]] * 2, [str(i)] * 2)
        assert [scored.reward for scored in found] == [1, 0]


def test_the_page_about_training_links_every_method() -> None:
    text = (ROOT / "docs/training.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (?:`([\w-]+)`|all) \| \[methods/(\w+)\.md\]\(methods/(\w+)\.md\)", text, re.M
    )
    assert {page for _, page, _ in rows} == {p.stem for p in (ROOT / "docs/methods").glob("*.md")}
    assert {stage for stage, _, _ in rows} - {""} == {*TRAINABLE}
    assert all(shown == linked for _, shown, linked in rows)


def test_the_table_of_losses_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (sums|means) \| (yes|no) \|", text_of("dpo"), re.M)
    found = {name: (of == "means", has == "yes") for name, _, of, has in rows}
    assert found == {n: (r.uses_means, r.uses_reference) for n, r in LOSS_TYPES.items()}


@pytest.mark.parametrize(("page", "count"), [("dpo", 9), ("sft", 5)])
def test_defaults_in_the_table_are_those_of_the_code(page: str, count: int) -> None:
    defaults = config.Run().flat()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([-\w., ]+) \| ", text_of(page), re.M)
    told = {
        name.strip("`"): value
        for names, values in rows
        if values != "loss of a pair"
        for name, value in zip(names.split(", "), values.split(", "), strict=True)
    }
    assert len(told) == count
    for name, value in told.items():
        default = "none" if defaults[name] is None else defaults[name]
        assert yaml.safe_load(value) == default, name
