"""Settings of a run, and the objective that must result of them: its numbers, and its terms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ernie
from ernie.attention import packed_causal
from ernie.moe import balance
from ernie.moe.router import Routing
from erniekit import losses, policy, session
from erniekit.config import resolved, run_from
from erniekit.device_batch import Flat
from erniekit.kto import Utility
from erniekit.loop import Orthogonal
from erniekit.recipes import kto, preference, reward, sft, upo

# The recipe of a stage, and where it finds its loss.
LOSSES = {
    "SFT": (sft, losses, "next_token"),
    "DPO": (preference, preference, "preference"),
    "KTO": (kto, kto, "kto"),
    "RM": (reward, reward, "bradley_terry"),
    "UPO": (upo, upo, "policy"),
}


def given_to_loss(stage: str, monkeypatch, **keys: object) -> dict:
    """What the method of such a run hands to its loss, with a batch of one answer."""
    recipe, home, name = LOSSES[stage]
    monkeypatch.setattr(home, name, lambda *read, **given: given | {"read": read})
    batch = SimpleNamespace(token_ids_T=torch.zeros(1), keys=(b"",))
    return recipe.method(run_from({"stage": stage, **keys}), "cpu").loss(None, batch)


def test_every_key_of_upo_reaches_the_objective(monkeypatch) -> None:
    keys = {
        "policy_loss": "gspo", "clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.02, "upo_mu": 0.7,
        "beta": 0.4,
    }  # fmt: skip
    wanted = policy.Objective("gspo", 0.1, 0.3, 0.02, 0.7, 0.4)
    assert given_to_loss("UPO", monkeypatch, **keys)["objective"] == wanted


def test_every_key_of_kto_reaches_the_utility(monkeypatch) -> None:
    """With the reference's number of the answer itself; that of the other one is `usual`'s."""
    asked = torch.tensor([[1.0, 2.0]])
    monkeypatch.setattr(kto, "reference_of", lambda references, batch: asked)
    keys = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6}
    given = given_to_loss("KTO", monkeypatch, **keys)
    assert given["utility"] == Utility(0.4, desirable_weight=1.5, undesirable_weight=0.6)
    assert given["read"][2].tolist() == [1.0]


@pytest.mark.parametrize("stage", list(LOSSES))
def test_every_stage_trains_routers_by_the_same_keys(stage: str, monkeypatch) -> None:
    keys = {
        "fine_tuning": "Full", "moe_aux_loss_lambda": 0.1, "moe_orthogonal_loss_lambda": 0.2,
        "moe_z_loss_lambda": 0.3, "loss_subbatch_seqlen": 77,
    }  # fmt: skip
    keys |= {"reference_free": True} if stage in ("DPO", "KTO") else {}
    given = given_to_loss(stage, monkeypatch, **keys)
    assert given["terms"] == losses.Terms(load_balance=0.1, orthogonal=0.2, z=0.3)
    assert given.get("chunk_size") == (None if stage == "RM" else 77)


# --- terms of the next-token loss, by the numbers of a model ---

SCALE = 0.05


def one_document(vocab_size: int) -> Flat:
    ids = torch.randint(vocab_size, (25,), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 24], dtype=torch.int32)
    return Flat(ids[:-1], ids[1:], torch.arange(24), bounds)


def mean_of(part, model: ernie.ErnieModel, batch: Flat) -> Tensor:
    """Mean over the layers with experts of a function of their routing."""
    routings: list[Routing | None] = []
    attend = packed_causal(batch.cu_seqlens_S1)
    model.hidden(batch.token_ids_T, batch.positions_T, attend, routings=routings)
    return torch.stack([part(routing) for routing in routings if routing is not None]).mean()


def load(model: ernie.ErnieModel, batch: Flat) -> Tensor:
    return mean_of(balance.load_balance_loss, model, batch)


def z(model: ernie.ErnieModel, batch: Flat) -> Tensor:
    return mean_of(balance.z_loss, model, batch)


def orthogonal(model: ernie.ErnieModel, batch: Flat, num_groups: int = 1) -> Tensor:
    weights = [router.weight for router in losses.routers_of(model)]
    return torch.stack([balance.orthogonal_loss(w, num_groups) for w in weights]).mean()


def by_four(model: ernie.ErnieModel, batch: Flat) -> Tensor:
    return orthogonal(model, batch, 4)


def after_next(model: ernie.ErnieModel, batch: Flat) -> Tensor:
    attend = packed_causal(batch.cu_seqlens_S1)
    hidden = model.hidden(batch.token_ids_T, batch.positions_T, attend)
    hidden = model.hidden_after_next(
        batch.token_ids_T.roll(-1), hidden, batch.positions_T, attend, depth=0
    )
    logits = model.head(hidden)[:-1]
    return SCALE * F.cross_entropy(logits, batch.labels_T[1:], reduction="sum")


def nothing(model: ernie.ErnieModel, batch: Flat) -> Tensor:
    return torch.zeros(())


ORTHOGONAL, MTP = "moe_orthogonal_loss_lambda", "multi_token_pred_lambda"


@pytest.mark.parametrize(
    ("key", "more", "term"),
    [
        ("moe_aux_loss_lambda", {}, load),
        ("moe_z_loss_lambda", {}, z),
        (ORTHOGONAL, {"moe_orthogonal_update": "loss"}, orthogonal),
        (ORTHOGONAL, {"moe_group_orthogonal_loss": True}, by_four),
        (ORTHOGONAL, {"moe_orthogonal_update": "decoupled"}, nothing),
        (ORTHOGONAL, {"moe_orthogonal_update": "decoupled_lr"}, nothing),
        (MTP, {"num_nextn_predict_layers": 1}, after_next),
        (MTP, {}, nothing),
        ("moe_aux_loss_lambda", {"fine_tuning": "LoRA"}, nothing),
        ("moe_z_loss_lambda", {"fine_tuning": "LoRA"}, nothing),
        (ORTHOGONAL, {"fine_tuning": "LoRA"}, nothing),
    ],
)
def test_a_weight_adds_so_many_times_its_term_to_the_loss(
    key: str, more: dict, term, grouped: Path
) -> None:
    model = ernie.load(grouped, dtype=torch.float32)
    batch = one_document(model.config.vocab_size)
    usual = {"fine_tuning": "Full", "moe_aux_loss_lambda": 0, "model_name_or_path": str(grouped)}
    with torch.no_grad():
        wanted = float(term(model, batch))
        plain = losses.next_token(model, batch, scale=SCALE)
        for weight in (0.3, 0.7):
            run = resolved(run_from(usual | more | {key: weight}), "cpu")
            loss = sft.method(run, "cpu").loss(model, batch, scale=SCALE)
            assert torch.equal(loss.value, plain.total), "it is no part of the reported loss"
            assert float(loss.total - loss.value) == pytest.approx(weight * wanted, rel=1e-4)
    assert (wanted == 0) == (term is nothing)


@pytest.mark.parametrize(
    ("update", "wanted"),
    [
        ("loss", None),
        ("decoupled", Orthogonal(0.2, False, 4)),
        ("decoupled_lr", Orthogonal(0.2, True, 4)),
    ],
)
def test_an_update_of_routers_beside_the_optimizer_has_the_numbers_of_the_run(
    update: str, wanted: Orthogonal | None, grouped: Path
) -> None:
    keys = {
        "moe_orthogonal_loss_lambda": 0.2, "moe_group_orthogonal_loss": True,
        "moe_orthogonal_update": update, "model_name_or_path": str(grouped),
    }  # fmt: skip
    assert session._orthogonal(run_from({"fine_tuning": "Full", **keys})) == wanted
    assert session._orthogonal(run_from({"fine_tuning": "LoRA", **keys})) is None
