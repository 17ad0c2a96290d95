"""Several processes train the same model as one; a checkpoint knows nothing of how many there were.

One process that accumulates over two batches is what two ranks with a batch each are compared to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from erniekit import checkpoint, losses, start
from erniekit.cli import main
from erniekit.config import Parallel, read_run, run_from
from erniekit.parallel import replicated, sharded
from erniekit.parallel.forms import form_of
from erniekit.parallel.ranks import ALONE, Ranks, degrees
from erniekit.recipes import sft
from tests.erniekit.conftest import dialogues, judgements, preferences, write_lines
from tests.helpers_train_ranks import NaNAt, ranks_train
from tests.helpers_vision import png

STEPS = 5


def words(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    kinds = {"DPO": "pairs-", "RM": "pairs-", "KTO": "judged-", "VL-SFT": "shapes-"}
    kind = kinds.get(str(more.get("stage")), "")
    values = {
        "model_name_or_path": model,
        "train_dataset_path": data / f"{kind}train.jsonl",
        "eval_dataset_path": data / f"{kind}eval.jsonl",
        "max_seq_len": 96,
        "buffer_size": 7,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "evaluation_strategy": "steps",
        "eval_steps": STEPS,
        "num_answers": 1,
        "max_answer_tokens": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "moe_aux_loss_lambda": 0.1,
        # Sums in float32, and an epsilon that keeps AdamW from making rounding into whole steps.
        "amp_master_grad": True,
        "use_lowprecision_moment": False,
        "adam_epsilon": 1e-3,
        "weight_decay": 0.1,
        **more,
        "output_dir": output,
    }
    return [f"{key}={value}" for key, value in values.items()]


MEAN = {"ema_decay": 0.6, "load_best_model_at_end": True, "save_steps": 1, "eval_steps": 1}
MEAN["greater_is_better"] = True  # the best is then the first, and not the last
KINDS = {
    "dense-full": ("tiny-dense", {"fine_tuning": "Full"}),
    "moe-full": (
        "tiny-moe",
        {
            "fine_tuning": "Full",
            "num_nextn_predict_layers": 1,
            "moe_use_aux_free_update_coef": 0.001,
            "moe_orthogonal_loss_lambda": 0.05,
            "moe_orthogonal_update": "decoupled",
        },
    ),
    "dense-lora": ("tiny-dense", {"fine_tuning": "LoRA"}),
    "moe-lora": ("tiny-moe", {"fine_tuning": "LoRA"}),
    "moe-nan": ("tiny-moe", {"fine_tuning": "Full"}),
    "dense-dpo": ("tiny-dense", {"fine_tuning": "Full", "stage": "DPO", "max_seq_len": 256}),
    "moe-dpo": (
        "tiny-moe",
        {
            "fine_tuning": "LoRA",
            "stage": "DPO",
            "max_seq_len": 256,
            "loss_type": "kto_pair",
            "sft_loss_ratio": 0.2,
            "beta": 0.5,
        },
    ),
    "dense-kto": (
        "tiny-dense",
        {"fine_tuning": "Full", "stage": "KTO", "beta": 0.5, "ref_model_update_steps": 2},
    ),
    "moe-rm": ("tiny-moe", {"fine_tuning": "Full", "stage": "RM", "max_seq_len": 256}),
    "dense-drop": (
        "tiny-dense",
        {
            "fine_tuning": "Full",
            "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.2,
            "dropout_warmup_steps": 3,
        },
    ),
    "dense-muon": ("tiny-dense", {"fine_tuning": "Full", "optim": "muon"}),
    "dense-mean": ("tiny-dense", {"fine_tuning": "Full", **MEAN}),
    "moe-mean": ("tiny-moe", {"fine_tuning": "LoRA", **MEAN}),
    # From the third step on there are no pictures: parts of the model have no gradient.
    "vl-full": (
        "tiny-vl",
        {
            "fine_tuning": "Full",
            "stage": "VL-SFT",
            "max_seq_len": 160,
            "max_pixels": 12544,
            "min_pixels": 784,
            "packing": False,
            "random_shuffle": False,
        },
    ),
}
FORMS = {
    "none": {},
    "stage1": {"sharding": "stage1"},
    "stage2": {"sharding": "stage2"},
    "stage3": {"sharding": "stage3", "recompute": True},
    "stage1-away": {"sharding": "stage1", "offload_optim": True},
    "stage2-away": {"sharding": "stage2", "offload_optim": True},
}
WHOLE = ("none", "stage1", "stage2", "stage3")
ALIKE = [
    *((kind, form) for kind in ("dense-full", "moe-full", "moe-lora") for form in WHOLE),
    ("dense-full", "stage2-away"),
    *(("dense-lora", form) for form in ("none", "stage3")),
    *(("moe-nan", form) for form in ("stage1", "stage3")),
    ("dense-muon", "stage1"),
    ("dense-drop", "stage3"),
    *(("dense-dpo", form) for form in ("none", "stage3")),
    ("moe-dpo", "stage3"),
    *(("dense-mean", form) for form in ("none", "stage1", "stage3", "stage1-away")),
    ("moe-mean", "stage1"),
    *(("dense-kto", form) for form in ("none", "stage3")),
    *(("moe-rm", form) for form in ("stage1", "stage3")),
    *(("vl-full", form) for form in ("none", "stage1")),
]
# The second pass of step 3 in one process is the third one of rank 1.
NAN_OF_ONE, NAN_OF_TWO = 6, [1, 3]


@pytest.fixture(scope="module")
def runs(tiny, data: Path, tmp_path_factory) -> Path:
    """A folder with the results: `<kind>` of one process, `<kind>-<form>` of two."""
    root = tmp_path_factory.mktemp("runs")
    write_lines(data / "pairs-train.jsonl", preferences(40))
    write_lines(data / "pairs-eval.jsonl", preferences(9, salt="about "))
    write_lines(data / "judged-train.jsonl", judgements(40))
    write_lines(data / "judged-eval.jsonl", judgements(9, salt="about "))
    (data / "shape.png").write_bytes(png((20, 90, 10), (90, 80)))
    seen = {"query": "<image>What is it?", "response": "A colour.", "images": ["shape.png"]}
    for split in ("train", "eval"):
        write_lines(data / f"shapes-{split}.jsonl", [seen] * 4 + dialogues(8))
    for kind, (name, settings) in KINDS.items():
        options = {**settings, "gradient_accumulation_steps": 2}
        with pytest.MonkeyPatch.context() as patch:
            if kind.endswith("nan"):
                patch.setattr(losses, "next_token", NaNAt(NAN_OF_ONE))
            assert main(["train", *words(tiny(name), data, root / kind, **options)]) == 0
    entries = []
    for kind, form in ALIKE:
        name, settings = KINDS[kind]
        options = {**settings, **FORMS[form]}
        entry = {"words": words(tiny(name), data, root / f"{kind}-{form}", **options)}
        entries.append(entry | {"nan": NAN_OF_TWO if kind.endswith("nan") else None})
    ranks_train(2, entries, root)
    return root


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def saved(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, and averages where it has them."""
    folder = output / f"checkpoint-{step}"
    state = load_file(folder / checkpoint.OPTIMIZER_FILE)
    averages = weights_in(folder / checkpoint.AVERAGE_FOLDER)
    return (
        weights_in(folder)
        | {f"state of {name}": tensor for name, tensor in state.items()}
        | {f"average of {name}": tensor for name, tensor in averages.items()}
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*model.safetensors"):
        found |= load_file(file)
    return found


def assert_alike(ours: dict, theirs: dict, bound: float = 1e-5) -> None:
    """Largest difference, relative to the largest value of a tensor, and its signed mean."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        gap = (ours[name].double() - expected.double()) / expected.abs().max().clamp(min=1e-9)
        worst, bias = gap.abs().max().item(), gap.mean().item()
        assert worst < bound, f"{name} is off by {worst:.2e}, relative to its largest value"
        assert abs(bias) < bound / 10, f"{name} is biased by {bias:.2e}"


def assert_same_curve(ours: list[dict], theirs: list[dict], bound: float = 1e-5) -> None:
    exact = ("step", "num_tokens", "num_trained_tokens", "total_tokens", "epoch", "eval_tokens")
    exact += ("num_pairs", "eval_pairs")
    near = ("loss", "mtp_loss", "aux_loss", "grad_norm", "eval_loss", "accuracy")
    near += (
        "moe_max_over_mean",
        "moe_entropy",
        "rewards_margin",
        "rewards_accuracy",
        "eval_rewards_margin",
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert [a.get(k) for k in exact] == [b.get(k) for k in exact]
        assert a.get("skipped") == b.get("skipped")
        for key in near:
            if b.get(key) is not None:
                size = max(abs(b[key]), 1.0) if "rewards" in key else abs(b[key])
                assert abs(a[key] - b[key]) <= bound * size, f"{key}: {a[key]}, not {b[key]}"


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "form"), ALIKE)
def test_two_ranks_equal_one_process(runs: Path, kind: str, form: str) -> None:
    ours, theirs = runs / f"{kind}-{form}", runs / kind
    if kind == "moe-full":
        assert all({"aux_loss", "mtp_loss"} <= r.keys() for r in records(theirs)[1:])
    assert_same_curve(records(ours), records(theirs))
    assert_alike(saved(ours), saved(theirs))


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "form"), [("dense-full", "stage2"), ("dense-mean", "stage1")])
def test_state_that_lies_elsewhere_is_the_same(runs: Path, kind: str, form: str) -> None:
    ours, theirs = saved(runs / f"{kind}-{form}-away"), saved(runs / f"{kind}-{form}")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), f"{name} differs"


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["dense-full", "moe-full", "moe-lora"])
def test_sharded_state_equals_replicated_bit_for_bit(runs: Path, kind: str) -> None:
    ours, theirs = saved(runs / f"{kind}-stage1"), saved(runs / f"{kind}-none")
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), f"{name} differs"


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "form"), [pair for pair in ALIKE if pair[0].endswith("mean")])
def test_best_weights_and_averages_are_those_of_one_process(
    runs: Path, kind: str, form: str
) -> None:
    ours, theirs = runs / f"{kind}-{form}", runs / kind
    best = [
        json.loads((o / checkpoint.BEST_FILE).read_text())["checkpoint"] for o in (ours, theirs)
    ]
    assert best == ["checkpoint-1", "checkpoint-1"]
    mean = checkpoint.AVERAGE_FOLDER
    for folder in ("", mean):
        assert weights_in(theirs / folder)
        # Rounded to bfloat16, where a last digit may differ.
        assert_alike(weights_in(ours / folder), weights_in(theirs / folder), bound=1e-2)
    for name, tensor in weights_in(ours / best[0] / mean).items():
        rounded = weights_in(ours / mean)[name]
        assert torch.equal(tensor.to(rounded.dtype), rounded), name
    weights, averages = (weights_in(theirs / best[1] / folder) for folder in ("", mean))
    assert any(not torch.equal(averages[name], weight) for name, weight in weights.items())


@pytest.mark.ranks
def test_nan_on_one_rank_is_skipped_by_all(runs: Path) -> None:
    for output in (runs / "moe-nan-stage1", runs / "moe-nan-stage3"):
        assert [r["step"] for r in records(output) if r.get("skipped")] == [3]


@pytest.mark.ranks
@pytest.mark.parametrize("form", ["stage1", "stage3"])
def test_one_process_goes_on_from_two_ranks(
    form: str, runs: Path, tiny, data: Path, tmp_path: Path
) -> None:
    name, settings = KINDS["moe-full"]
    more = {**settings, "gradient_accumulation_steps": 2, "max_steps": STEPS + 2, "save_steps": 1}
    for origin in ("moe-full", f"moe-full-{form}"):
        shutil.copytree(runs / origin, tmp_path / origin)
        assert main(["train", *words(tiny(name), data, tmp_path / origin, **more)]) == 0
    ours, theirs = tmp_path / f"moe-full-{form}", tmp_path / "moe-full"
    assert_same_curve(records(ours), records(theirs))
    # Means of squares are off by twice as much as the gradients they come from.
    assert_alike(saved(ours, STEPS + 2), saved(theirs, STEPS + 2), bound=2e-5)


@pytest.mark.ranks
@pytest.mark.slow
def test_checkpoint_goes_on_with_other_numbers_of_ranks(tiny, data: Path, tmp_path: Path) -> None:
    """On 2, 4 and 1 ranks in turn, and on 1, 2 and 4, in other forms each time: as on one all
    along. Four ranks are two copies of two shards.
    """
    name, settings = KINDS["moe-full"]

    def part(output: str, steps: int, num_ranks: int, **more: object) -> list[str]:
        given = {**settings, "max_steps": steps, "save_steps": steps, "evaluation_strategy": "no"}
        given["gradient_accumulation_steps"] = 4 // num_ranks
        return words(tiny(name), data, tmp_path / output, **given, **more)

    def train_here(*of_part: object) -> None:
        assert main(["train", *part(*of_part)]) == 0  # type: ignore[arg-type]

    half = {"sharding_parallel_degree": 2}
    train_here("unbroken", 6, 1)
    train_here("up", 2, 1)
    on_two = [part("down", 2, 2, sharding="stage1"), part("up", 4, 2, sharding="stage3")]
    on_four = [
        part("down", 4, 4, sharding="stage3", **half),
        part("up", 6, 4, sharding="stage1", **half),
    ]
    ranks_train(2, [{"words": given} for given in on_two], tmp_path)
    ranks_train(4, [{"words": given} for given in on_four], tmp_path)
    train_here("down", 6, 1)
    for output in (tmp_path / "down", tmp_path / "up"):
        assert_same_curve(records(output), records(tmp_path / "unbroken"))
        assert_alike(saved(output, 6), saved(tmp_path / "unbroken", 6))


@pytest.fixture
def one_rank(tmp_path: Path):
    """A group of one process by itself."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(tmp_path / "group"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["moe-full", "moe-lora"])
def test_model_in_the_hands_of_fsdp_equals_a_plain_one(
    kind: str, device: str, one_rank, tiny, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """One shard of one: all that sharding does, on either kind of device, but the exchange."""
    name, settings = KINDS[kind]
    more = {**settings, "device": device, "nproc_per_node": 1}
    plain, cut = words(tiny(name), data, tmp_path / "plain", **more), tmp_path / "cut"
    assert main(["train", *plain]) == 0
    mesh = init_device_mesh(device, (1, 1), mesh_dim_names=("replicate", "shard"))
    ranks = Ranks(0, 1, mesh)
    form = sharded.Sharded(ranks, keep_whole_in_step=False)
    monkeypatch.setattr(start, "form_of", lambda run, ranks: form)
    assert sft.run(read_run(words(tiny(name), data, cut, **more)), device, ranks) == 0
    bound = 1e-5 if device == "cpu" else 2e-2
    assert_same_curve(records(cut), records(tmp_path / "plain"), bound)
    assert_alike(saved(cut), saved(tmp_path / "plain"), bound)


def test_sums_travel_during_the_backward_pass(monkeypatch) -> None:
    """All but those of the vocabulary, which are complete at its end; each once, in order."""
    sent: list[tuple[bool, int]] = []

    def all_reduce(flat: torch.Tensor, **_: object) -> SimpleNamespace:
        if flat.dtype == torch.float32:  # else it is how many ranks have each of them
            sent.append((is_over, flat.numel()))
        return SimpleNamespace(wait=lambda: flat.mul_(2))

    monkeypatch.setattr(replicated.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(replicated, "BUCKET_BYTES", 20_000)
    model = ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    model.init_weights(seed=0)
    named = dict(model.named_parameters())
    ids_T = torch.arange(20)
    flat = losses.Flat(ids_T, ids_T.roll(-1), ids_T, torch.tensor([0, 20], dtype=torch.int32))
    loss = losses.next_token(model, flat, scale=1.0)
    expected = torch.autograd.grad(loss.total, list(named.values()))
    form = replicated.Replicated(Ranks(0, 2), shards_state=False)
    gradients = form.gradients(model, named, torch.float32)
    loss = losses.next_token(model, flat, scale=1.0, gradients=gradients)
    gradients.expect_last()
    is_over = False
    loss.total.backward()
    is_over = True
    gradients.complete()

    sizes = {
        over: sum(size for was_over, size in sent if was_over is over) for over in (True, False)
    }
    apart = {id(p): p.numel() for p in (model.head_weight, model.model.embed_tokens.weight)}
    assert sizes[True] == sum(apart.values()) and len(sent) > 4, sent
    assert sum(sizes.values()) == sum(p.numel() for p in named.values())
    found = gradients.present()
    assert_alike(found, {name: 2 * g for name, g in zip(named, expected)})


def test_owners_have_about_the_same() -> None:
    sizes = [100, 90, 40, 30, 20, 10, 5, 5]
    owners = replicated.owners_of({str(i): n for i, n in enumerate(sizes)}, 3)
    loads = [sum(sizes[int(n)] for n, o in owners.items() if o == rank) for rank in range(3)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= 10, loads


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, 8, (8, 1)),
        ({"sharding": "stage1"}, 8, (1, 8)),
        ({"sharding": "stage3", "sharding_parallel_degree": 4}, 8, (2, 4)),
        ({"sharding": "stage3", "data_parallel_degree": 2}, 8, (2, 4)),
        ({"sharding_parallel_degree": 2}, 8, (4, 2)),
        ({"sharding": "stage1", "sharding_parallel_degree": 3}, 8, None),
        ({"data_parallel_degree": 2}, 8, None),
        ({"sharding": "stage1", "sharding_parallel_degree": 2}, 1, None),
    ],
)
def test_degrees(settings: dict, size: int, expected: tuple[int, int] | None) -> None:
    if expected is not None:
        assert degrees(Parallel(**settings), size) == expected
        return
    with pytest.raises(ConfigError, match=f"but there are {size}"):
        degrees(Parallel(**settings), size)


def test_one_process_exchanges_nothing() -> None:
    values = [torch.tensor(1.5), torch.tensor([2, 3])]
    assert ALONE.all_reduce(values) is values and ALONE.own(values) == values
    assert ALONE.broadcast({"a": 1}) == {"a": 1} and ALONE.all_reduce_max(3) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {
                "optimizer_in_backward": True,
                "max_grad_norm": 0,
                "gradient_accumulation_steps": 1,
            },
            "optimizer_in_backward",
        ),
    ],
)
def test_what_needs_one_process_is_refused_in_two(settings: dict, told: str) -> None:
    run = run_from(settings)
    assert isinstance(form_of(run, ALONE), replicated.Replicated)
    with pytest.raises(ConfigError, match=told):
        form_of(run, Ranks(0, 2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sharding": "stage4"}, "stage3"),
        ({"nproc_per_node": 0}, "nproc_per_node=0"),
        ({"data_parallel_degree": -2}, "data_parallel_degree=-2"),
        ({"ddp_timeout": 0}, "ddp_timeout=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_from(settings)
