"""What a server of rollouts is told and given, without one: weights, pauses, keys, leftovers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ernie
from ernie.attention import packed_causal
from ernie.model import ErnieModel
from erniekit.build import build_model
from erniekit.config import Run, resolved, run_from
from erniekit.samplers import Served

IDS = [5, 6, 7, 8, 9, 10, 11]


def run_of(folder: Path, output: Path, **more: object) -> Run:
    values = {
        "stage": "UPO", "model_name_or_path": str(folder), "output_dir": str(output),
        "rollout_server": "http://127.0.0.1:9", "lora_rank": 4,
    } | more  # fmt: skip
    return resolved(run_from(values), "cpu")


@torch.no_grad()
def trained(run: Run) -> ErnieModel:
    """The model of a run whose trained parts are not where they began."""
    model = build_model(run, "cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def hidden(model: ErnieModel) -> torch.Tensor:
    bounds = torch.tensor([0, len(IDS)], dtype=torch.int32)
    return model.hidden(torch.tensor(IDS), torch.arange(len(IDS)), packed_causal(bounds))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


FORMS = [
    {"compute_type": kind, **form}
    for kind in ("bf16", "wint8", "wint4/8", "nf4")
    for form in ({}, {"use_dora": True}, {"pissa": True})
]
FORMS += [{"fine_tuning": "Full"}, {"compute_type": "nf4", "qlora_weight_double_quant": True}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_server_is_given_what_the_policy_computes(
    name: str, form: dict, tiny, tmp_path: Path, monkeypatch
) -> None:
    run = run_of(tiny(name), tmp_path / "out", **form)
    model, told = trained(run), []

    def post(self: Served, path: str, body: dict | None = None) -> None:
        told.append(path)
        if body:
            given = ernie.load(body["path"], dtype=torch.float32)
            told.append(distance(hidden(given), hidden(model)))

    monkeypatch.setattr(Served, "_post", post)
    Served(run, "cpu").update(model)
    pause, update, gap, resume = told
    assert [pause, update, resume] == ["/v1/pause", "/v1/update_weights", "/v1/resume"]
    # Weights are rounded to bfloat16, and a token near a border goes to another expert.
    assert gap < (0.06 if "moe" in name else 0.01), f"off by {gap}"
    untrained = distance(hidden(ernie.load(tiny(name), dtype=torch.float32)), hidden(model))
    assert untrained > 5 * gap, f"{untrained} is what it was before training: this shows nothing"
