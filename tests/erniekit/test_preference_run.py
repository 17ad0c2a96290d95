"""`stage: DPO` through the commands: learning, the reference and its file, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ernie
from erniekit import checkpoint, reference
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.stream import stream
from erniekit.device_batch import Pairs, to_device
from erniekit.evaluate import eval_batches
from erniekit.lora_files import put_in
from erniekit.preference import sequence_log_probs
from erniekit.preference_losses import Objective
from erniekit.recipes.preference import objective_of
from erniekit.reference import REFERENCE_FILE
from tests.erniekit.conftest import judgements, preferences, write_lines
from tests.erniekit.test_run import records
from tests.helpers_faults import killed


@pytest.fixture
def words(tiny, tmp_path: Path):
    """A function from settings to the words of a short run; the model is tiny and dense."""
    write_lines(tmp_path / "train.jsonl", preferences(40))
    write_lines(tmp_path / "eval.jsonl", preferences(9, salt="about "))

    def make(**more: object) -> list[str]:
        values = {
            "stage": "DPO",
            "model_name_or_path": tiny("tiny-dense"),
            "train_dataset_path": tmp_path / "train.jsonl",
            "eval_dataset_path": tmp_path / "eval.jsonl",
            "output_dir": tmp_path / "out",
            "max_seq_len": 256,
            "max_steps": 12,
            "learning_rate": 5e-3,
            "evaluation_strategy": "steps",
            "eval_steps": 6,
            "save_strategy": "no",
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def references(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / REFERENCE_FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"report_to": "swanlab"}, "swanlab needs the Python package swanlab"),
        (
            {"no_recompute_layers": 99, "recompute": True},
            "=99 is not a layer of the model; give 0 to",
        ),
        (
            {"metric_for_best_model": "lossx"},
            "eval_lossx is not a number of an evaluation; use one",
        ),
    ],
)
def test_what_will_fail_is_found_before_the_reference_reads(
    more: dict, message: str, words, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    assert main(["train", *words(**more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / REFERENCE_FILE).exists()


@pytest.mark.parametrize(
    ("fine_tuning", "name"), [("Full", "tiny-moe"), ("LoRA", "tiny-moe"), ("LoRA", "tiny-dense")]
)
def test_training_raises_the_held_out_accuracy(
    fine_tuning, name, words, tiny, tmp_path: Path, capsys
) -> None:
    more = {"fine_tuning": fine_tuning, "model_name_or_path": tiny(name)}
    assert main(["train", *words(**more)]) == 0
    found = records(tmp_path / "out")
    held_out = {r["step"]: r for r in found if "eval_loss" in r}
    assert list(held_out) == [0, 6, 12]
    first, last = held_out[0], held_out[12]
    # Before training the policy is the reference: margins are 0 and the loss is log 2.
    assert first["eval_rewards_accuracy"] == 0.5 and first["eval_pairs"] == 9
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert found[1]["rewards_margin"] == pytest.approx(0, abs=1e-5)
    assert last["eval_rewards_accuracy"] > 0.9, last
    assert last["eval_loss"] < 0.5 and last["eval_rewards_margin"] > 0.5, last
    for record in found[1:]:
        gap = record["rewards_chosen"] - record["rewards_rejected"] - record["rewards_margin"]
        assert abs(gap) < 1e-9 and record["num_pairs"] > 0

    told = capsys.readouterr().out
    assert "| margin 0.0000 | right 50 % |" in told and "9 pairs" in told
    page = (tmp_path / "out/report.html").read_text()
    for shown in (f"DPO {'with LoRA' if fine_tuning == 'LoRA' else '(full)'}", "Reward margin",
                  "Preference accuracy", "What is about"):  # fmt: skip
        assert shown in page

    # `eval` reads the final model; Full weights were rounded to bfloat16 for it.
    assert main(["eval", *words(**more)]) == 0
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert abs(results["eval_loss"] - last["eval_loss"]) < 0.05
    assert results["eval_rewards_accuracy"] == last["eval_rewards_accuracy"]


# --- the reference ---


def test_references_of_lora_and_full_agree_with_adapters_off(words, tiny, tmp_path: Path) -> None:
    """The file of a Full run, that of a LoRA run, and the trained LoRA model without adapters."""
    base = tmp_path / "bfloat16"
    ernie.save(ernie.load(tiny("tiny-dense"), dtype=torch.bfloat16), base)
    outputs = {kind: tmp_path / kind for kind in ("Full", "LoRA")}
    for kind, output in outputs.items():
        more = {"fine_tuning": kind, "output_dir": output, "model_name_or_path": base}
        assert main(["train", *words(**more)]) == 0
    values = {
        kind: {r["pair"]: r["log_probs"] for r in references(output)[1:]}
        for kind, output in outputs.items()
    }
    assert values["Full"].keys() == values["LoRA"].keys() and len(values["LoRA"]) == 49
    run = run_from(dict(w.split("=") for w in words(model_name_or_path=base)))
    plain, model = (ernie.load(base, dtype=torch.bfloat16) for _ in range(2))
    put_in(model, outputs["LoRA"], base)
    for batch in eval_batches(run, stream(run, "eval")):
        pairs = to_device(batch, model.device)
        assert isinstance(pairs, Pairs)
        with torch.no_grad():
            off = sequence_log_probs(plain, pairs)
            on = sequence_log_probs(model, pairs)
        kept = torch.tensor([values["LoRA"][key.hex()] for key in batch.keys])
        full = torch.tensor([values["Full"][key.hex()] for key in batch.keys])
        assert (off - kept).abs().max() < 1e-4
        assert (off - on).abs().max() > 1.0, "the adapter was to have learnt something"
        assert (full - kept).abs().max() < 1e-4


@pytest.mark.parametrize("stage", ["DPO", "KTO"])
def test_the_reference_is_without_the_adapter_that_training_starts_from(
    stage, words, tmp_path: Path, capsys
) -> None:
    files = {}
    if stage == "KTO":
        files = {
            f"{split}_dataset_path": write_lines(tmp_path / f"{split}-kto.jsonl", judgements(12))
            for split in ("train", "eval")
        }
    more = {"stage": stage, "fine_tuning": "LoRA", "max_steps": 2, **files}
    assert main(["train", *words(**more)]) == 0
    assert "without the adapter of lora_path" not in capsys.readouterr().out
    again = {**more, "output_dir": tmp_path / "again", "lora_path": tmp_path / "out"}
    assert main(["train", *words(**again)]) == 0
    assert capsys.readouterr().out.count("without the adapter of lora_path") == 1
    assert references(tmp_path / "out") == references(tmp_path / "again")
    first, other = (records(tmp_path / name)[0] for name in ("out", "again"))
    assert abs(first["eval_rewards_margin"]) < 1e-5 < abs(other["eval_rewards_margin"])


def test_the_reference_is_computed_once_for_a_folder(words, tmp_path: Path, monkeypatch) -> None:
    assert main(["train", *words(max_steps=4)]) == 0
    before = (tmp_path / "out" / REFERENCE_FILE).read_text()
    monkeypatch.setattr(reference, "read_model", lambda *_: pytest.fail("the model was read"))
    assert main(["train", *words(max_steps=4, beta=0.5, overwrite_output_dir="true")]) == 0
    assert main(["eval", *words()]) == 0
    assert (tmp_path / "out" / REFERENCE_FILE).read_text() == before


def test_a_file_of_another_model_or_half_a_line_is_not_used(
    words, tiny, tmp_path: Path, capsys
) -> None:
    again = words(max_steps=4, overwrite_output_dir="true")
    assert main(["train", *again]) == 0
    path = tmp_path / "out" / REFERENCE_FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert main(["train", *again]) == 0
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    assert path.read_text().splitlines()[0] == whole.splitlines()[0]
    other = tmp_path / "other"
    shutil.copytree(tiny("tiny-dense"), other)
    model = ernie.load(other, dtype=torch.float32)
    model.init_weights(seed=5)
    ernie.save(model, other)
    assert main(["train", *again, f"model_name_or_path={other}"]) == 0
    assert "is of another model and weights; it is not used" in capsys.readouterr().out
    # Weights between the ends of a file, as a merged adapter of some layers changes them.
    middle = ernie.load(other, dtype=torch.float32)
    with torch.no_grad():
        middle.model.layers[1].self_attn.q_proj.weight += 0.5
    ernie.save(middle, other)
    assert main(["train", *again, f"model_name_or_path={other}"]) == 0
    assert "is of another weights; it is not used" in capsys.readouterr().out
    changed = {r["pair"]: r["log_probs"] for r in references(tmp_path / "out")[1:]}
    for entry in map(json.loads, whole.splitlines()[1:]):
        assert changed[entry["pair"]] != entry["log_probs"]


def test_without_a_reference_rewards_are_log_probabilities(words, tmp_path: Path) -> None:
    assert main(["train", *words(reference_free="true", max_steps=1)]) == 0
    assert not (tmp_path / "out" / REFERENCE_FILE).exists()
    first = records(tmp_path / "out")[1]
    assert first["rewards_chosen"] < -1 and first["rewards_rejected"] < first["rewards_chosen"]


# --- resuming ---


@pytest.mark.parametrize("fine_tuning", [pytest.param("LoRA", marks=pytest.mark.slow), "Full"])
def test_killed_twice_equals_unbroken(fine_tuning: str, words, tiny, tmp_path: Path) -> None:
    """Killed while it asks the reference, and three steps after a save."""
    name = "tiny-moe" if fine_tuning == "Full" else "tiny-dense"
    more = {
        "fine_tuning": fine_tuning, "model_name_or_path": tiny(name), "save_strategy": "steps",
        "save_steps": 4, "eval_steps": 5, "gradient_accumulation_steps": 2, "buffer_size": 7,
        "dataloader_num_workers": 1, "evaluation_strategy": "steps",
    }  # fmt: skip
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", *words(output_dir=unbroken, **more)]) == 0

    again = ["train", *words(output_dir=broken, **more)]
    killed("erniekit.reference", "References._add", 3, again)
    assert 1 < len(references(broken)) < len(references(unbroken))
    killed("erniekit.optim", "AdamW.step", 7, again)
    assert [step for step, _ in checkpoint.checkpoints(broken)] == [4]
    assert main(again) == 0

    timed = {"seconds", "tokens_per_second", "peak_memory_gib", "eval_seconds"}
    curves = [
        [{k: v for k, v in r.items() if k not in timed} for r in records(output)]
        for output in (broken, unbroken)
    ]
    assert curves[0] == curves[1]
    assert references(broken) == references(unbroken)
    file = "adapter_model.safetensors" if fine_tuning == "LoRA" else "model.safetensors"
    for part in (file, f"checkpoint-12/{file}", f"checkpoint-12/{checkpoint.OPTIMIZER_FILE}"):
        ours, theirs = load_file(broken / part), load_file(unbroken / part)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] == tensor).all(), f"{part}: {key} differs"


def test_more_steps_than_before_ask_the_reference_for_what_is_new(words, tmp_path: Path) -> None:
    more = {"packing": "false", "save_strategy": "steps", "fine_tuning": "Full"}
    assert main(["train", *words(max_steps=10, **more)]) == 0
    assert len(references(tmp_path / "out")) == 1 + 10 + 9
    assert main(["train", *words(max_steps=30, **more)]) == 0
    straight = tmp_path / "straight"
    assert main(["train", *words(max_steps=30, output_dir=straight, **more)]) == 0
    ours, theirs = (
        {r["pair"]: r["log_probs"] for r in references(output)[1:]}
        for output in (tmp_path / "out", straight)
    )
    assert ours == theirs and len(ours) == 30 + 9


def test_steps_are_counted_from_the_pairs(words, tmp_path: Path) -> None:
    arguments = words(max_steps=-1, num_train_epochs=2, packing="false", batch_size=4)
    assert main(["train", *arguments]) == 0
    found = records(tmp_path / "out")
    assert len(found) - 1 == 2 * 40 / 4
    assert [r["num_pairs"] for r in found[1:]] == [4] * 20


def test_data_of_another_stage_is_refused_with_its_lines(words, data: Path, capsys) -> None:
    assert main(["train", *words(train_dataset_path=data / "train.jsonl", max_steps=-1)]) == 2
    told = capsys.readouterr()
    assert f"left out {data / 'train.jsonl'}:" in told.out
    assert "40 of 40 records cannot be used" in told.err


@pytest.mark.parametrize("loss_type", ["orpo", "kto_pair"])
def test_a_loss_of_two_parts_is_their_weighted_sum(loss_type: str, words, tmp_path: Path) -> None:
    """In training and on held-out pairs, whose means do not depend on how they are packed."""
    more = {"loss_type": loss_type, "pref_loss_ratio": 0.3, "max_steps": 4, "eval_steps": 2}
    more |= {"sft_loss_ratio": 1} if loss_type == "kto_pair" else {}
    held_out = []
    for packing in ("true", "false"):
        output = tmp_path / packing
        assert main(["train", *words(output_dir=output, packing=packing, **more)]) == 0
        assert (output / REFERENCE_FILE).exists() == (loss_type == "kto_pair")
        found = records(output)
        for prefix in ("", "eval_"):
            for r in (r for r in found if f"{prefix}loss" in r):
                value = 0.3 * r[f"{prefix}preference_loss"] + r[f"{prefix}sft_loss"]
                assert r[f"{prefix}loss"] == pytest.approx(value, rel=1e-5)
        held_out.append({k: v for k, v in found[0].items() if k != "eval_seconds"})
        sft = [r["eval_sft_loss"] for r in found if "eval_sft_loss" in r]
        assert len(sft) == 3 and sft[-1] < sft[0], "the supervised part was to teach something"
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["orpo", "or", "ipo"])
def test_a_beta_that_the_loss_does_not_have_is_told_with_what_weighs_it(
    loss_type: str, words, tmp_path: Path, capsys
) -> None:
    losses = []
    for beta in (0.1, 0.4):
        more = {"output_dir": tmp_path / str(beta), "loss_type": loss_type, "beta": beta}
        assert main(["train", *words(max_steps=1, evaluation_strategy="no", **more)]) == 0
        losses.append(records(tmp_path / str(beta))[0]["loss"])
        advice = f"beta (on the loss of {loss_type}, whose weight is pref_loss_ratio; it scales"
        is_told = advice in capsys.readouterr().out
        assert is_told == (beta == 0.4 and loss_type != "ipo")
    assert (losses[0] == losses[1]) == (loss_type != "ipo")


def test_every_key_reaches_the_objective() -> None:
    keys = {
        "loss_type": "dpop", "beta": 0.2, "pref_loss_ratio": 0.4, "sft_loss_ratio": 0.6,
        "simpo_gamma": 0.7, "dpop_lambda": 8.0, "normalize_logps": False,
    }  # fmt: skip
    run = run_from({"stage": "DPO", **keys})
    wanted = Objective("dpop", 0.2, 0.0, False, 0.7, 8.0, 0.4, 0.6)
    assert objective_of(run.preferences) == wanted
    run = run_from({"stage": "DPO", "loss_type": "robust", "label_smoothing": 0.1})
    wanted = Objective("robust", label_smoothing=0.1, normalises_lengths=True)
    assert objective_of(run.preferences) == wanted
    run = run_from({"stage": "DPO", "loss_type": "orpo"})
    assert objective_of(run.preferences).sft_weight == 1
