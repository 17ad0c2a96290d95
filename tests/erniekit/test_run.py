"""The commands on a tiny model: train, eval, export, and what they leave on disk."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ernie
from ernie.models import TINY
from erniekit import lora_files, losses, serve
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.config.stages import STAGES
from erniekit.data.survey import Overlap
from erniekit.lora import LoRA, add_lora
from erniekit.lora_files import put_in
from tests.erniekit.conftest import dialogues, write_lines


@pytest.fixture
def words(tiny, data: Path, tmp_path: Path):
    """A function from settings to the words of a short run; the model is tiny and dense."""

    def make(**more: object) -> list[str]:
        values = {
            "model_name_or_path": tiny("tiny-dense"),
            "train_dataset_path": data / "train.jsonl",
            "eval_dataset_path": data / "eval.jsonl",
            "output_dir": tmp_path / "out",
            "max_seq_len": 96,
            "max_steps": 15,
            "learning_rate": 2e-2,
            "evaluation_strategy": "steps",
            "eval_steps": 5,
            "save_strategy": "no",
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_training_lowers_the_held_out_loss(fine_tuning, name, words, tiny, tmp_path: Path) -> None:
    more = {"fine_tuning": fine_tuning, "model_name_or_path": tiny(name)}
    assert main(["train", *words(**more)]) == 0
    found = records(tmp_path / "out")
    assert [r["step"] for r in found] == list(range(16))
    held_out = {r["step"]: r["eval_loss"] for r in found if "eval_loss" in r}
    assert list(held_out) == [0, 5, 10, 15]
    assert held_out[15] < held_out[0] - 0.1, held_out

    # `eval` reads the final model; Full weights were rounded to bfloat16 for it.
    assert main(["eval", *words(**more)]) == 0
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert abs(results["eval_loss"] - held_out[15]) < 0.02
    assert results["eval_ppl"] == pytest.approx(math.exp(results["eval_loss"]))


def test_numbers_of_an_evaluation_are_those_of_the_stage(words, tmp_path: Path) -> None:
    assert main(["train", *words(max_steps=1)]) == 0
    found = {key for key in records(tmp_path / "out")[0] if key.startswith("eval_")}
    assert found == {f"eval_{name}" for name in STAGES["SFT"].evaluated}


def test_multimodal_models_have_a_stage_of_their_own(words, tiny, capsys) -> None:
    assert main(["train", *words(model_name_or_path=tiny("tiny-vl"))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "reads pictures too; use stage: VL-SFT, which takes records of text" in error


@pytest.mark.parametrize("verb", ["train", "eval", "data", "plan"])
def test_a_model_that_is_not_named_is_asked_for(verb: str, words, capsys) -> None:
    given = [w for w in words() if not w.startswith("model_name_or_path")]
    assert main([verb, *given]) == 2
    assert "model_name_or_path is not set; give the folder" in capsys.readouterr().err


def test_export_equals_base_plus_adapter(words, tiny, tmp_path: Path) -> None:
    assert main(["train", *words(lora_rank=4, rslora="true")]) == 0
    assert main(["export", *words()]) == 0
    base, out = tiny("tiny-dense"), tmp_path / "out"
    adapted = ernie.load(base, dtype=torch.float32)
    put_in(adapted, out, base)
    merged = ernie.load(out / "export", dtype=torch.float32)
    worst = (adapted.logits(range(30)) - merged.logits(range(30))).abs().max().item()
    assert worst < 1e-4, f"merged logits are off by {worst:.2e}"
    assert merged.tokenizer is not None
    assert json.loads((out / "export/config.json").read_text())["torch_dtype"] == "float32"


def test_adapter_files_have_the_names_that_peft_expects() -> None:
    model = ernie.ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    model.init_weights(seed=0)
    pair = LoRA(rank=3, alpha=6, is_rank_stabilised=True)
    add_lora(model, pair, seed=0)
    shapes = {name: tuple(t.shape) for name, t in lora_files.adapter_tensors(model).items()}
    layer = "base_model.model.model.layers.2"
    assert shapes[f"{layer}.self_attn.q_proj.lora_A.weight"] == (3, 48)
    assert shapes[f"{layer}.self_attn.q_proj.lora_B.weight"] == (96, 3)
    assert shapes[f"{layer}.mlp.down_proj.lora_A.weight"] == (3, 88)
    assert len(shapes) == 2 * 7 * 3
    config = json.loads(lora_files.adapter_config(model, pair, "base"))
    assert config["peft_type"] == "LORA" and config["use_rslora"] is True
    assert config["r"] == 3 and config["lora_alpha"] == 6
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections


@pytest.mark.parametrize(
    ("without", "plus", "scale"),
    [
        ({}, {"lora_plus_scale": 6}, 6),
        ({"rslora": True}, {"rslora_plus": True, "lora_alpha": 16}, 4),
    ],
)
def test_lora_plus_moves_b_matrices_so_much_further_and_nothing_else(
    without: dict, plus: dict, scale: int, words, tmp_path: Path
) -> None:
    """In AdamW's first step, which is the learning rate in size: B, and the magnitudes of DoRA. The
    short name of rsLoRA with it is rsLoRA in all else, whatever alpha is given.
    """
    more = {
        "max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_dora": True,
        "adam_epsilon": 1e-20, "evaluation_strategy": "no", "num_answers": 0,
    }  # fmt: skip
    found = []
    for name, keys in (("without", without), ("plus", plus)):
        assert main(["train", *words(output_dir=tmp_path / name, **more, **keys)]) == 0
        found.append(load_file(tmp_path / name / lora_files.ADAPTER_FILE))
    for name, tensor in found[0].items():
        factor = scale if "lora_B" in name else 1
        torch.testing.assert_close(found[1][name], factor * tensor, rtol=1e-5, atol=0)
        if "lora_B" in name:
            assert float(tensor.abs().max()) == pytest.approx(1e-3, rel=1e-3), name
    files = [tmp_path / name / lora_files.ADAPTER_CONFIG for name in ("without", "plus")]
    assert files[0].read_text() == files[1].read_text()


def test_an_adapter_of_another_model_is_refused(words, tiny, tmp_path: Path, capsys) -> None:
    assert main(["train", *words(max_steps=1)]) == 0
    assert main(["export", *words(model_name_or_path=tiny("tiny-moe"))]) == 2
    assert "belong to no projection of this model" in capsys.readouterr().err


def test_an_adapter_is_not_served_before_it_is_merged(words, tiny, tmp_path: Path, capsys) -> None:
    assert main(["train", *words(max_steps=1)]) == 0
    assert main(["server", *words()]) == 2
    assert "merge it first" in capsys.readouterr().err
    assert main(["export", *words()]) == 0
    run = run_from(dict(word.split("=") for word in words()))
    command = serve.server_command(run)
    assert command[command.index("--model") + 1] == str(tmp_path / "out/export")


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(
    words, tmp_path: Path, monkeypatch, capsys
) -> None:
    real, calls = losses.next_token, []

    def sometimes_nan(*arguments, **options):
        loss = real(*arguments, **options)
        calls.append(1)
        if len(calls) % 2:
            loss.total = loss.total * float("nan")
        return loss

    monkeypatch.setattr(losses, "next_token", sometimes_nan)
    assert main(["train", *words(max_skipped_steps=3, evaluation_strategy="no")]) == 2
    error = capsys.readouterr().err
    assert "skipped steps: 4, the last step 7" in error
    assert "because its loss or gradient is not finite" in error
    found = records(tmp_path / "out")
    assert [r["step"] for r in found if r.get("skipped")] == [1, 3, 5, 7]
    assert all(math.isfinite(r["loss"]) for r in found[1::2])


def test_overlap_of_training_and_evaluation_data_is_told(words, data, caplog) -> None:
    logging.getLogger("erniekit").propagate = True
    write_lines(data / "both.jsonl", [*dialogues(3), *dialogues(5, salt="of the ")])
    with caplog.at_level(logging.WARNING):
        arguments = words(eval_dataset_path=data / "both.jsonl", max_steps=-1, num_train_epochs=1)
        from erniekit.launch import run_training

        assert run_training(run_from(dict(word.split("=") for word in arguments))) == 0
    assert "3 of 8 evaluation samples are also in the training data" in caplog.text


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_overlap_is_told_as_training_samples_are_read(strategy, words, data, capsys) -> None:
    write_lines(data / "both.jsonl", [*dialogues(3), *dialogues(5, salt="of the ")])
    more = {"eval_dataset_path": data / "both.jsonl", "evaluation_strategy": strategy}
    assert main(["train", *words(**more, max_steps=40, packing="false", eval_steps=40)]) == 0
    told = "".join(capsys.readouterr())
    first = "a sample of the evaluation data is also in the training data"
    assert told.count(first) == 1
    assert told.count("3 of 8 evaluation samples are also in the training data") == 1
    assert told.index(first) < told.index("step 00040") < told.index("3 of 8 evaluation samples")


@pytest.mark.parametrize("settings", [{}, {"do_eval": "false", "evaluation_strategy": "no"}])
def test_no_overlap_is_told_where_there_is_none(settings, words, capsys, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Overlap, "__call__", lambda self, sample: seen.append(sample))
    assert main(["train", *words(max_steps=2, **settings)]) == 0
    assert "also in the training data" not in "".join(capsys.readouterr())
    assert bool(seen) == ("do_eval" not in settings)


def test_steps_are_counted_from_the_data(words, tmp_path: Path) -> None:
    arguments = words(max_steps=-1, num_train_epochs=2, packing="false", batch_size=4)
    assert main(["train", *arguments]) == 0
    found = records(tmp_path / "out")
    assert len(found) - 1 == 2 * 40 / 4
    assert found[-1]["epoch"] == 2.0


def test_random_weights_need_only_config_and_tokenizer(words, tiny, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for path in tiny("tiny-dense").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    arguments = words(
        model_name_or_path=folder, continue_training="false", fine_tuning="Full", max_steps=2
    )
    assert main(["train", *arguments]) == 0
    assert ernie.load(tmp_path / "out").config == ernie.load(tiny("tiny-dense")).config


def test_training_starts_from_an_adapter_that_is_given(words, tmp_path: Path) -> None:
    more = {"lora_rank": 4, "evaluation_strategy": "steps", "eval_steps": 6, "max_steps": 6}
    assert main(["train", *words(**more, output_dir=tmp_path / "first")]) == 0
    again = {**more, "lora_path": tmp_path / "first", "output_dir": tmp_path / "second"}
    assert main(["train", *words(**again)]) == 0
    ends, begins = records(tmp_path / "first")[-1], records(tmp_path / "second")[0]
    assert begins["step"] == 0 and begins["eval_loss"] == pytest.approx(ends["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lora_rank": 3}, "has lora_rank 4 (this run: 3), lora_alpha 8.0 (this run: 6.0)"),
        ({"lora_rank": 4, "use_dora": True}, "has use_dora False (this run: True)"),
        ({"lora_rank": 4, "model": "tiny-moe"}, "belong to no projection of this model"),
        ({"lora_rank": 4, "lora_path": "nowhere"}, "nowhere holds no adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit_is_no_start(
    more, told, words, tiny, tmp_path: Path, capsys
) -> None:
    assert main(["train", *words(lora_rank=4, max_steps=1, output_dir=tmp_path / "first")]) == 0
    model = {"model_name_or_path": tiny(more.pop("model"))} if "model" in more else {}
    given = {"lora_path": tmp_path / "first", **more, **model}
    assert main(["train", *words(**given)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_an_output_folder_that_cannot_be_made_is_one_sentence(
    place: str, words, tmp_path: Path, capsys
) -> None:
    (tmp_path / "a file").write_text("")
    assert main(["train", *words(output_dir=tmp_path / place)]) == 2
    assert f"output_dir {tmp_path / place} cannot be made: " in capsys.readouterr().err


def test_rows_are_as_full_as_those_of_this_start(words, tmp_path: Path) -> None:
    whole = words(max_steps=3, evaluation_strategy="no")
    assert main(["train", *whole, "gradient_accumulation_steps=4", "stop_after_step=2"]) == 0
    before = [r["num_tokens"] for r in records(tmp_path / "out")]
    assert main(["train", *whole, "gradient_accumulation_steps=1"]) == 0
    last = records(tmp_path / "out")[-1]["num_tokens"]
    assert min(before) > 2 * last  # as after a resume on fewer ranks
    found = json.loads((tmp_path / "out/plan_error.json").read_text())
    assert found["row_fill"] == last / 96
