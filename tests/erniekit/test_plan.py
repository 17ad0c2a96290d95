"""The plan of a run beside the real tensors of tiny models, and what it suggests."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import ernie
from ernie.attention import shared_prompt, shared_prompts
from ernie.models import TINY
from ernie.vision.config import VisionConfig
from erniekit import losses, plan_report
from erniekit.build import config_of, lora_of, still, trained_parameters, weights_dtype
from erniekit.cli import main
from erniekit.config import Run, resolved, run_from
from erniekit.device_batch import Flat, Seen
from erniekit.dropout import add_dropout
from erniekit.fit import fitted
from erniekit.gradients import Gradients
from erniekit.lora import add_lora
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.plan import (
    GIB,
    Degrees,
    Sizes,
    _tower_backward,
    kept_words,
    picture_words,
    plan,
    sizes_of,
)
from erniekit.recompute import recompute
from erniekit.reward_model import add_reward_head

DENSE = TINY["tiny-dense"]
MOE = dataclasses.replace(
    TINY["tiny-moe"], head_dim=16, num_nextn_predict_layers=0, num_hidden_layers=3
)
FORMS = {
    "Full": {"fine_tuning": "Full"},
    "LoRA": {"fine_tuning": "LoRA"},
    "DoRA": {"fine_tuning": "LoRA", "use_dora": True},
    "dropout": {"fine_tuning": "LoRA", "lora_dropout": 0.1, "hidden_dropout_prob": 0.1},
}
RELEASED = "baidu/ERNIE-4.5-0.3B-PT"


def planned(**settings: object) -> Run:
    return resolved(run_from(settings), "cpu")


def built(config, run: Run) -> ernie.ErnieModel:
    model = ernie.ErnieModel(config, dtype=weights_dtype(run, "cpu"))
    model.init_weights(seed=0)
    if run.is_lora:
        add_lora(model, lora_of(run), seed=0)
    if run.model.stage == "RM":
        add_reward_head(model, seed=0)
    return model


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA", "DoRA"])
@pytest.mark.parametrize("low", ["true", "false"])
@pytest.mark.parametrize("stage", ["SFT", "RM"])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon"])
def test_weights_sums_and_state_equal_real_ones(config, fine_tuning, low, stage, optim) -> None:
    precision = {"use_lowprecision_moment": low} if optim == "adamw" else {}
    run = planned(
        **FORMS[fine_tuning],
        **precision,
        optim=optim,
        amp_master_grad=low,
        lora_rank=3,
        stage=stage,
    )
    model = built(config, run)
    trained = trained_parameters(model)
    dtype = torch.float32 if run.optimisation.amp_master_grad else torch.bfloat16
    head = (model.head_weight, model.model.embed_tokens.weight)
    sums = Gradients(trained, dtype, float32_for=head)
    rates = treatments(trained, run.optimisation, num_layers=3, lora_plus_scale=1.0)
    optimizer = OPTIMIZERS[optim](trained, rates, run.optimisation, seed=0)
    sizes = sizes_of(config, run, "cpu")
    assert sizes.weights.total() == num_bytes([*model.parameters(), *model.buffers()])
    assert sizes.sums.total() == num_bytes(sums.sum_of(p) for p in trained.values())
    assert sizes.state.total() == num_bytes(optimizer.tensors().values())
    assert sizes.num_trained == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("fine_tuning", FORMS)
@pytest.mark.parametrize("granularity", [None, "full", "full_attn", "mlp"])
@pytest.mark.parametrize("stage", ["SFT", "DPO", "RM", "UPO"])
def test_kept_activations_equal_what_autograd_saves(
    config, fine_tuning, granularity, stage
) -> None:
    """A pair is nearly all prompt, as it is planned for; of answers there are three of 8 tokens."""
    more = {"recompute": True, "recompute_granularity": granularity} if granularity else {}
    if stage == "UPO":
        more |= {"max_seq_len": 48, "max_completion_length": 8, "num_generations": 3}
        more |= {"prompts_per_round": 1}
    run = planned(**FORMS[fine_tuning], lora_rank=3, stage=stage, **more)
    model = built(config, run)
    dropout = add_dropout(model, run)
    recompute(model, run.recomputed)
    tokens = 64
    ids_T, positions_T = torch.arange(tokens) % 199, torch.arange(tokens)
    batch = Flat(ids_T, ids_T, positions_T, torch.tensor([0, tokens], dtype=torch.int32))
    attend = losses.packed_causal(batch.cu_seqlens_S1)
    if stage == "UPO":
        attend = shared_prompts([[0, 40, 48, 56, tokens]], torch.device("cpu"))
        named = {"model_name_or_path": RELEASED, "device": "cpu"}
        assert plan(planned(stage=stage, **more, **named), "cpu").tokens_per_step == tokens
    elif stage != "SFT":
        attend = shared_prompt(torch.tensor([[0, tokens - 2, tokens - 1, tokens]]))
    with dropout.during(0, 0):
        counted = words_kept(
            model, lambda routings: model.hidden(ids_T, positions_T, attend, routings=routings)
        ) / tokens  # fmt: skip
    # cos and sin, shared by the layers; a recomputed attention holds them without saving them
    tables = 0 if granularity in ("full", "full_attn") else config.head_dim
    formula = tables + sum(kept_words(config, run, n) for n in range(config.num_hidden_layers))
    assert formula == pytest.approx(counted, rel=0.1 if run.model.use_dora else 0.05), (
        f"{formula:.0f} planned, {counted:.0f} kept"
    )


def test_models_beside_the_policy_are_planned() -> None:
    """A reference of Full, the base that answers are drawn from of LoRA, and a reward model."""

    def others(**more: object) -> int:
        run = planned(model_name_or_path=RELEASED, stage="UPO", **more)
        return plan(run, "cpu").parts["other models"]

    of_bfloat16 = 2 * config_of(RELEASED).num_params()
    assert others(fine_tuning="Full", kl_coef=0, upo_mu=0) == 0
    assert others(fine_tuning="Full") == pytest.approx(2 * of_bfloat16, rel=0.01)
    assert others(fine_tuning="LoRA") == of_bfloat16
    assert others(fine_tuning="LoRA", rollout_server="http://127.0.0.1:1") == 0
    scored = {"reward": "model", "reward_model": RELEASED, "rollout_server": "http://127.0.0.1:1"}
    assert others(fine_tuning="LoRA", **scored) == of_bfloat16


VL = dataclasses.replace(
    TINY["tiny-vl"], head_dim=16, freq_allocation=4, num_attention_heads=4, num_key_value_heads=2,
    vision_config=VisionConfig(depth=2, embed_dim=64, mlp_ratio=4, num_heads=4),
)  # fmt: skip


@pytest.mark.parametrize("granularity", [None, "full"])
@pytest.mark.parametrize("words", ["Full", "LoRA", "freeze_vision"])
def test_kept_activations_of_images_equal_what_autograd_saves(granularity, words) -> None:
    """A row of nothing but images, whose tokens all go to vision experts."""
    again = {"recompute": True, "recompute_granularity": granularity} if granularity else {}
    frozen = {"freeze_config": words} if words == "freeze_vision" else {}
    fine_tuning = "LoRA" if words == "LoRA" else "Full"
    run = planned(fine_tuning=fine_tuning, lora_rank=3, stage="VL-SFT", **again, **frozen)
    model = built(VL, run)
    for name in still(dict(model.named_parameters()), run):
        model.get_parameter(name).requires_grad_(False)
    recompute(model, run.recomputed)
    tokens, grid = 64, (1, 16, 16)
    ids_T, positions_T = torch.full((tokens,), VL.im_patch_id or 0), torch.arange(tokens)
    pixels_PC = torch.zeros((256, 588), dtype=torch.uint8)
    seen = Seen(pixels_PC, [grid], positions_T, torch.ones_like(positions_T))
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    batch = Flat(ids_T, ids_T, positions_T.expand(3, -1), bounds, pictures=seen)
    counted = words_kept(model, lambda routings: losses.hidden_of(
        model, batch, losses.packed_causal(bounds), routings
    )) / tokens  # fmt: skip
    tables = 0 if granularity == "full" else VL.head_dim
    formula = tables + picture_words(VL, run)
    formula += sum(kept_words(VL, run, n, 1) for n in range(VL.num_hidden_layers))
    assert formula == pytest.approx(counted, rel=0.07), f"{formula:.0f} planned, {counted:.0f} kept"


@pytest.mark.parametrize("granularity", [None, "full"])
def test_the_backward_pass_of_a_tower_holds_what_is_planned(granularity) -> None:
    again = {"recompute": True, "recompute_granularity": granularity} if granularity else {}
    run = planned(fine_tuning="Full", stage="VL-SFT", **again)
    model = built(VL, run).requires_grad_(False)
    recompute(model, run.recomputed)
    tower = model.vision_model
    assert tower is not None
    tokens, grid = 1024, (1, 64, 64)
    tower.requires_grad_(True)
    pixels_PC = torch.zeros((4 * tokens, 588), dtype=torch.uint8)
    rows_PW = tower(pixels_PC, [grid], torch.float32)
    known = sum(t.numel() for t in tower.parameters())
    with Live() as live:
        rows_PW.backward(torch.ones_like(rows_PW))
    kept, passing = _tower_backward(VL, run)
    counted = (live.peak / 4 - known) / tokens
    assert passing == pytest.approx(counted, rel=0.1), f"{passing:.0f} planned, {counted:.0f} held"
    assert kept > 0


class Live(TorchDispatchMode):
    """The most bytes at a time of tensors that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_by_storage: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {StorageWeakRef(t.untyped_storage()) for t in args if isinstance(t, torch.Tensor)}
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                storage = StorageWeakRef(made.untyped_storage())
                if storage not in old:
                    self.bytes_by_storage[storage] = made.untyped_storage().nbytes()
        self.bytes_by_storage = {s: n for s, n in self.bytes_by_storage.items() if not s.expired()}
        self.peak = max(self.peak, sum(self.bytes_by_storage.values()))
        return out


def words_kept(model: ernie.ErnieModel, forward: Callable[[list], torch.Tensor]) -> float:
    """Words that autograd keeps of a forward pass, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live: weakref.WeakSet[Kept] = weakref.WeakSet()

    def note(saved: torch.Tensor | tuple[object, ...]) -> Kept:
        live.add(kept := Kept(saved))
        return kept

    hooks = torch.autograd.graph.saved_tensors_hooks

    def noting(pack: Callable, unpack: Callable) -> hooks:
        """Hooks within hide those around them from autograd."""
        return hooks(lambda saved: note(pack(saved)), lambda kept: unpack(kept.saved))

    routings: list = []
    with (
        pytest.MonkeyPatch.context() as patch,
        noting(lambda saved: saved, lambda saved: saved),
    ):
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", noting)
        hidden_TD = forward(routings)
    assert hidden_TD.requires_grad
    saved = [kept.saved for kept in live]
    tensors = [t for one in saved for t in (one if isinstance(one, tuple) else (one,))]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    for routing in filter(None, routings):  # held for the balance losses
        tensors += [t for bank in routing.banks for t in (bank.probs_TE, bank.logits_TE)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in known) / 4


@dataclasses.dataclass(eq=False)
class Kept:
    saved: torch.Tensor | tuple[object, ...]  # or what it is made of


SMALLER_BATCH = "batch_size gradient_accumulation_steps"
AGAIN = "recompute recompute_granularity plan_memory_gib"


@pytest.mark.parametrize(
    ("settings", "limit", "expected"),
    [
        (
            {"fine_tuning": "Full", "batch_size": 4},
            6,
            [SMALLER_BATCH, AGAIN, "max_seq_len"],
        ),
        # What only costs time comes before what changes the result, two of it before one of that.
        (
            {"fine_tuning": "Full", "batch_size": 8, "max_seq_len": 8192},
            8,
            [f"{SMALLER_BATCH} {AGAIN}"],
        ),
        (
            {"model_name_or_path": "baidu/ERNIE-4.5-21B-A3B-PT"},
            26,
            ["recompute recompute_granularity compute_type"] * 3,
        ),
    ],
)
def test_each_suggested_change_fits_when_it_is_planned_itself(settings, limit, expected) -> None:
    run = planned(**{"model_name_or_path": RELEASED, "max_seq_len": 2048} | settings)
    limit *= GIB
    assert plan(run, "cpu").peak > limit
    changes = plan_report.changes_that_fit(run, "cpu", Degrees(), limit)
    assert len(changes) == 3
    assert [" ".join(change.settings) for change in changes][: len(expected)] == expected
    for change in changes:
        values = {k: v for k, v in run.flat().items() if v not in (None, [])}
        own = fitted(planned(**{**values, **change.settings}), "cpu", Degrees())
        assert plan(own, "cpu").peak == change.plan.peak <= limit, change.settings


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer_in_backward": True, "max_grad_norm": 0, "batch_size": 8},
        {"continue_training": False, "batch_size": 8},
        {"freeze_parameters": "attention", "batch_size": 8},
    ],
)
def test_no_change_is_suggested_that_would_be_refused(settings: dict) -> None:
    values = {"model_name_or_path": RELEASED, "max_seq_len": 2048, "fine_tuning": "Full"} | settings
    run, num_found = planned(**values), 0
    for share in (0.8, 0.5, 0.2):
        limit = int(share * plan(run, "cpu").peak)
        for change in plan_report.changes_that_fit(run, "cpu", Degrees(), limit):
            own = fitted(planned(**{**values, **change.settings}), "cpu", Degrees())
            assert plan(own, "cpu").peak == change.plan.peak <= limit, change.settings
            num_found += 1
    assert num_found


def test_ranks_divide_the_weights_and_the_note_says_what_cannot_run(capsys) -> None:
    words = ["plan", "model_name_or_path=baidu/ERNIE-4.5-300B-A47B-PT", "device=cpu", "--json"]
    found = []
    for more in ([], ["tensor_parallel_degree=8", "pipeline_parallel_degree=2"]):
        main([*words, *more])
        found.append(json.loads(capsys.readouterr().out))
    one, many = found
    assert many["ranks"] == 16
    share = one["parts"]["weights"] / many["parts"]["weights"]
    assert share == pytest.approx(16, rel=0.01), share


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_sharding_divides_what_it_says(fine_tuning: str) -> None:
    config = TINY["tiny-moe"]

    def sizes(stage: str | None, shards: int) -> Sizes:
        given = {"fine_tuning": fine_tuning, "sharding": stage}
        return sizes_of(config, planned(**given), "cpu", Degrees(sharding=shards))

    one = sizes(None, 1)
    for stage, divided in (
        ("stage1", ("state",)),
        ("stage2", ("state", "sums", "weights")),
        ("stage3", ("state", "sums", "weights")),
    ):
        many = sizes(stage, 4)
        for part in ("state", "sums", "weights"):
            share = getattr(many, part).total() / getattr(one, part).total()
            if part not in divided:
                assert share == 1, f"{stage}: {part}"
            else:  # owners have whole parameters, of which there are few here
                assert 0.25 <= share < 0.4, f"{stage}: {part} is {share:.2f} of one rank's"
    assert one.gathered == sizes("stage1", 4).gathered == 0
    blocks = [size for layer, size in one.weights.items() if layer >= 0]
    again = max(blocks) * (fine_tuning == "Full")
    assert sizes("stage2", 4).gathered == one.weights.total() + again
    assert sizes("stage3", 4).gathered == one.weights[-1] + 2 * max(blocks) + again


def test_the_number_of_processes_says_how_often_sharding_divides(capsys) -> None:
    words = ["plan", f"model_name_or_path={RELEASED}", "device=cpu", "--json", "fine_tuning=Full"]
    main([*words, "sharding=stage3", "nproc_per_node=8", "data_parallel_degree=2"])
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["copies"]) == (4, 2)


@pytest.mark.parametrize(
    ("degrees", "num_ranks"),
    [
        ("", 1),
        ("nproc_per_node=4", 4),
        ("nproc_per_node=4 sharding=stage2", 4),
        ("nproc_per_node=8 sharding=stage1 data_parallel_degree=2", 8),
        ("nproc_per_node=4 sharding=stage1 sharding_parallel_degree=1", 4),
        ("sharding_parallel_degree=2 data_parallel_degree=3", 6),
        ("nproc_per_node=8 tensor_parallel_degree=4", 2),
        ("nproc_per_node=8 expert_parallel_degree=4", 8),
    ],
)
def test_the_tokens_of_a_step_are_those_of_all_ranks(degrees, num_ranks, capsys) -> None:
    words = ["plan", f"model_name_or_path={RELEASED}", "device=cpu", "--json"]
    main(
        [
            *words,
            "batch_size=2",
            "gradient_accumulation_steps=3",
            "max_seq_len=64",
            *degrees.split(),
        ]
    )
    assert json.loads(capsys.readouterr().out)["tokens_per_step"] == 2 * 3 * 64 * num_ranks


@pytest.mark.parametrize(
    ("settings", "num_checkpoints"),
    [
        ("max_steps=4 save_steps=2", 2),
        ("max_steps=5 save_steps=2", 3),
        ("max_steps=5 save_steps=2 stop_after_step=3", 4),
        ("max_steps=5 save_steps=2 stop_after_step=4", 3),
        ("max_steps=8 save_strategy=epoch num_train_epochs=4", 4),
        ("max_steps=8 save_strategy=no", 0),
        ("save_strategy=no", 0),
        ("max_steps=8 save_steps=1 save_total_limit=2", 3),
        ("max_steps=8 save_steps=4 save_total_limit=2", 2),
        (
            "max_steps=8 save_steps=1 save_total_limit=1 evaluation_strategy=steps "
            "eval_dataset_path=held_out.jsonl",
            3,
        ),
    ],
)
def test_disk_is_that_of_what_lies_there_at_once(settings, num_checkpoints, capsys) -> None:
    words = [f"model_name_or_path={RELEASED}", "device=cpu", *settings.split()]
    main(["plan", "--json", *words])
    found = json.loads(capsys.readouterr().out)
    assert found["disk_bytes"] - found["final_bytes"] == num_checkpoints * found["checkpoint_bytes"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("save_steps=20", "data)"),
        ("save_strategy=epoch num_train_epochs=4", "data)"),
        ("save_steps=20 save_total_limit=2", "data, at most 3 at once)"),
    ],
)
def test_disk_is_that_of_a_checkpoint_where_the_data_says_how_many(settings, told, capsys) -> None:
    words = [f"model_name_or_path={RELEASED}", "device=cpu", *settings.split()]
    main(["plan", "--json", *words])
    assert json.loads(capsys.readouterr().out)["disk_bytes"] is None
    main(["plan", *words])
    assert f"per checkpoint (their number depends on the {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no settings were given"),
        (["model_name_or_path=nowhere"], "is no folder, was not fetched"),
        (
            [f"model_name_or_path={RELEASED}", "plan_memory_gib=much"],
            "plan_memory_gib='much' is not a number",
        ),
        ([f"model_name_or_path={RELEASED}", "tensor_parallel_degree=x"], "is not a degree"),
        ([f"model_name_or_path={RELEASED}", "batch_sise=2"], "unknown key"),
        ([f"model_name_or_path={RELEASED}", "no_recompute_layers=18"], "is not a layer of the"),
        (
            [
                f"model_name_or_path={RELEASED}",
                "nproc_per_node=4",
                "data_parallel_degree=3",
                "sharding=stage2",
            ],
            "make 3 x 1 ranks, but there are 4",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, told, capsys) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error, error
