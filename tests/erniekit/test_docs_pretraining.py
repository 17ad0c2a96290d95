"""The pages about pre-training and experts: settings are a run, and what they name exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ernie.models import MODELS
from erniekit import config, foreign, metrics
from erniekit.config import read_run, run_from
from erniekit.plan import plan

ROOT = Path(__file__).parents[2]
PAGES = ("pretraining", "moe")
RECORDED = {
    "moe_max_over_mean", "moe_entropy", "moe_dead_experts", "moe_layers", "moe_loads",
    "moe_dropped", "aux_loss", "z_loss", "orthogonal_loss", "eval_bits_per_byte",
    "mtp_loss",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_a_run_and_every_key_that_is_named_exists(page: str) -> None:
    text = (ROOT / f"docs/methods/{page}.md").read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    run = run_from(yaml.safe_load(block))
    assert run.model.stage == "PT" and not run.without_effect
    for _, path, _ in [*run.data.files("train"), *run.data.files("eval")]:
        assert (ROOT / path).is_file(), path
    for folder in re.findall(r"`(examples/configs/[\w./-]+)`", text):
        assert list((ROOT / folder).glob("run_*.yaml")), folder
    keys = {f.name for kind in config.GROUPS for f in dataclasses.fields(kind)}
    choices = {"decoupled_lr", "shared_experts", "use_ortho_loss_callback", "head_dim"}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:: [^`]+)?`", text))
    unknown = named - keys - RECORDED - choices - foreign.RENAMED.keys()
    unknown -= foreign.WITHOUT_EFFECT.keys()
    assert not unknown, f"docs/methods/{page}.md names {sorted(unknown)}"


def test_the_weight_of_the_token_after_next_and_the_models_with_a_block_are_right() -> None:
    text = (ROOT / "docs/methods/pretraining.md").read_text("utf-8")
    (weight,) = re.findall(r"lambda is `multi_token_pred_lambda`, ([\d.]+) as", text)
    assert float(weight) == config.Run().model.multi_token_pred_lambda
    (told,) = re.findall(r"^(.*) have such a block", text, re.M)
    has = {n for n, model in MODELS.items() if model.config.num_nextn_predict_layers}
    assert {name.removesuffix("-Base").removeprefix("ERNIE-4.5-") for name in has} == {
        name.removeprefix("ERNIE-4.5-") for name in told.split(" and ")
    }


def test_the_line_in_the_text_is_that_of_a_step() -> None:
    record = {"step": 1, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0, "seconds": 1.0,
              "tokens_per_second": 1.0, "peak_memory_gib": 1.0, "moe_max_over_mean": 1.34,
              "moe_entropy": 0.87, "moe_dead_experts": 2}  # fmt: skip
    told = metrics.line(record, 10).split(" | ")[-1]
    assert f"`{told}`" in (ROOT / "docs/methods/moe.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/configs").glob("ERNIE*/pt/run_pt_*.yaml"))
)
def test_published_files_can_be_planned(path: Path) -> None:
    found = plan(config.resolved(read_run([str(path)]), "cuda"), "cuda")
    assert 3e8 < found.num_trained <= found.num_params < 1.01 * found.num_trained
    frozen = read_run([str(path), "freeze_parameters=embeddings"])
    less = plan(config.resolved(frozen, "cuda"), "cuda")
    assert 0 < less.num_trained < found.num_trained and less.peak < found.peak
