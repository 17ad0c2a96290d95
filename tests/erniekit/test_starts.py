"""What a start does with the folder that it finds: nothing is lost by a mistake, nothing stale is
taken for what the run has made.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ernie
from ernie.settings import ConfigError
from erniekit import checkpoint, inputs, lora_files, serve
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.inputs import refuse_changes
from erniekit.metrics import Metrics
from tests.erniekit.conftest import preferences, write_lines
from tests.erniekit.test_resume import curve, words


def short(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    """Words of a run of four steps, a checkpoint every two."""
    values = {"max_steps": 4, "save_steps": 2, "evaluation_strategy": "no", "num_answers": 0}
    return words(model, data, output, **(values | {"learning_rate": 1e-3} | more))


def test_a_mistake_with_overwrite_loses_nothing(tiny, data: Path, tmp_path: Path, capsys) -> None:
    model = tiny("tiny-dense")
    assert main(short(model, data, tmp_path, fine_tuning="Full")) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    run_yaml = (tmp_path / "run.yaml").read_text()
    for key in ("train_dataset_path", "model_name_or_path"):
        wrong = {key: tmp_path / "nothing", "overwrite_output_dir": True, "fine_tuning": "Full"}
        assert main(short(model, data, tmp_path, **wrong)) == 2
    wrong = {"lora_path": tmp_path / "nothing", "overwrite_output_dir": True}
    assert main(short(model, data, tmp_path, **wrong)) == 2  # when all else is built
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert (tmp_path / "run.yaml").read_text() == run_yaml
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 4]

    capsys.readouterr()
    for key in ("model_name_or_path", "resume_from_checkpoint"):
        for folder in (tmp_path, tmp_path / "checkpoint-4"):
            wrong = {"overwrite_output_dir": True, key: folder}
            assert main(short(model, data, tmp_path, **wrong)) == 2
            assert f"{key}={folder} is what training into output_dir" in capsys.readouterr().err
    assert checkpoint.has_model(tmp_path)


def test_settings_of_the_users_own_do_not_make_a_folder_that_of_a_run(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "mine"
    shutil.copytree(tiny("tiny-moe"), output)
    own = output / "run.yaml"
    own.write_text(f"output_dir: {output}  # and a remark")
    before = {path: path.read_bytes() for path in output.iterdir()}
    words = short(tiny("tiny-dense"), data, output)
    assert main([words[0], str(own), *words[1:]]) == 2
    told = capsys.readouterr().err
    assert ", run.yaml, " in told and "which no training run has written" in told
    assert {path: path.read_bytes() for path in before} == before


def test_data_that_would_be_written_over_is_refused(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    assert main(short(tiny("tiny-dense"), data, output)) == 0
    for verb in ("train", "eval"):
        for name in ("rollouts", "held_out", "eval_samples", "metrics"):
            path = output / f"{name}.jsonl"
            path.write_bytes((data / "eval.jsonl").read_bytes())
            for key in ("train_dataset_path", "eval_dataset_path"):
                capsys.readouterr()
                words = short(tiny("tiny-dense"), data, output, **{key: path}, max_steps=4)
                assert main([verb, *words[1:]]) == 2, (verb, name, key)
                assert f"{path} is to be read" in capsys.readouterr().err
            assert path.read_bytes() == (data / "eval.jsonl").read_bytes()


def test_what_is_removed_on_request_is_told(tiny, data: Path, tmp_path: Path, capsys) -> None:
    words = short(tiny("tiny-dense"), data, tmp_path, save_steps=1)
    assert main(words) == 0
    found = [path.name for _, path in checkpoint.checkpoints(tmp_path)]
    capsys.readouterr()
    assert main([*words, "overwrite_output_dir=true"]) == 0
    told = f"overwrite_output_dir: removed from {tmp_path}: {', '.join(found)}"
    assert len(found) > 1 and told in "".join(capsys.readouterr())


@pytest.mark.parametrize("is_anew", [True, False])
def test_the_way_on_does_not_start_anew(is_anew: bool) -> None:
    run = run_from({"output_dir": "my out", "overwrite_output_dir": is_anew})
    assert run.way_on == ("erniekit resume 'my out'" if is_anew else "the same command")


def test_what_no_run_has_written_is_not_removed(tiny, data: Path, tmp_path: Path, capsys) -> None:
    model = tiny("tiny-dense")
    kept = ["config.json", "export/thesis.txt", "checkpoint-500/weights.bin", "metrics.jsonl"]
    kept += ["run.yaml", "rollouts.jsonl"]
    for name in kept:
        path = tmp_path / name.partition(".")[0] / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        output = tmp_path / name.partition(".")[0]
        for more in ({}, {"overwrite_output_dir": True}):
            capsys.readouterr()
            assert main(short(model, data, output, **more)) == 2
            told = capsys.readouterr().err
            assert f" holds {name.partition('/')[0]}, which no" in told, told
            assert told.count("\n") == 1, told
            assert "give another output_dir" in told and path.read_text() == "mine"

    output = tmp_path / "own"
    output.mkdir()
    (output / "notes.txt").write_text("mine")  # in nobody's way
    assert main(short(model, data, output)) == 0
    assert main(short(model, data, output, overwrite_output_dir=True, fine_tuning="Full")) == 0
    assert (output / "notes.txt").read_text() == "mine"
    (tmp_path / "moved").mkdir()
    (output / "checkpoint-2").rename(tmp_path / "moved/checkpoint-2")  # a run's own, if alone
    assert main(short(model, data, tmp_path / "moved", fine_tuning="Full")) == 0


def test_a_start_that_goes_on_leaves_no_stale_model(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    model, base = tiny("tiny-dense"), f"model_name_or_path={tiny('tiny-dense')}"
    assert main(short(model, data, tmp_path, ema_decay=0.9)) == 0
    assert main(["export", base, f"output_dir={tmp_path}"]) == 0
    run = run_from({"output_dir": str(tmp_path)})
    assert serve.served_model(run) == str(tmp_path / "export")

    assert main(short(model, data, tmp_path, ema_decay=0.9)) == 0  # all is done: all stays
    assert (tmp_path / "export/config.json").is_file() and (tmp_path / "ema").is_dir()
    again = short(model, data, tmp_path, max_steps=8, stop_after_step=6)
    capsys.readouterr()
    assert main(again) == 0
    assert "the final model, ema/, export/" in capsys.readouterr().out
    assert checkpoint.chosen(tmp_path, None) == tmp_path / "checkpoint-6"
    assert main(short(model, data, tmp_path, max_steps=8)) == 0
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        serve.served_model(run)

    full = {"fine_tuning": "Full", "overwrite_output_dir": True}
    assert main(short(model, data, tmp_path, **full, stop_after_step=2)) == 0
    assert checkpoint.chosen(tmp_path, None) == tmp_path / "checkpoint-2"
    assert main(short(model, data, tmp_path, **full)) == 0
    assert not (tmp_path / lora_files.ADAPTER_CONFIG).exists()
    assert serve.served_model(run) == str(tmp_path)
    assert main(short(model, data, tmp_path, overwrite_output_dir=True)) == 0
    assert not (tmp_path / "config.json").exists() and not list(tmp_path.glob("model*"))


def test_another_stage_or_base_does_not_go_on(tiny, data: Path, tmp_path: Path, capsys) -> None:
    model = tiny("tiny-dense")
    assert main(short(model, data, tmp_path)) == 0
    pairs = write_lines(data / "pairs.jsonl", preferences(8))
    others = [
        ({"stage": "DPO", "train_dataset_path": pairs, "max_seq_len": 256}, "stage=SFT", "DPO"),
        ({"model_name_or_path": tiny("tiny-moe")}, f"model_name_or_path={model}", "tiny-moe"),
    ]
    for more, before, now in others:
        capsys.readouterr()
        assert main(short(model, data, tmp_path, **more)) == 2
        told = capsys.readouterr().err
        assert f"is of a run with {before}, this one has" in told and now in told
        assert "another output_dir, or overwrite_output_dir=true" in told
    there = model.parent / ".." / model.parent.name / model.name
    assert main(short(there, data, tmp_path, max_steps=5)) == 0  # the same, in other words
    assert [row[0] for row in curve(tmp_path)] == list(range(1, 6))


def test_more_epochs_are_more_steps(tiny, data: Path, tmp_path: Path, capsys) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 1, "save_steps": 100}
    assert main(short(tiny("tiny-dense"), data, tmp_path, **epochs)) == 0
    num_steps = curve(tmp_path)[-1][0]
    capsys.readouterr()
    assert main(["resume", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"all {num_steps} steps are done" in told and "an epoch is" not in told
    assert main(["resume", str(tmp_path), "num_train_epochs=3"]) == 0
    assert "an epoch is" in capsys.readouterr().out
    assert 3 * num_steps - 2 <= curve(tmp_path)[-1][0] <= 3 * num_steps


def test_a_start_that_trains_nothing_says_so_last(tiny, data: Path, tmp_path: Path, capsys) -> None:
    model = tiny("tiny-dense")

    def told(**more: object) -> list[str]:
        assert main(short(model, data, tmp_path, **more)) == 0
        return capsys.readouterr().out.splitlines()

    assert not any("nothing was trained" in line for line in told(max_steps=6))
    nothing = "nothing was trained in this start: the run has done 6 steps, and"
    anew = "overwrite_output_dir=true or another output_dir trains anew"
    lines = told(max_steps=6, learning_rate=1e-4)
    assert f"{nothing} a run of 6 was asked for" in lines[-1] and anew in lines[-1]
    assert any("all 6 steps are done" in line for line in lines)
    lines = told(max_steps=4)
    assert f"{nothing} a run of 4 was asked for" in lines[-1] and anew in lines[-1]
    assert any("6 steps are done, of 4" in line for line in lines)
    assert checkpoint.has_model(tmp_path)
    assert f"{nothing} stop_after_step=3 was asked for" in told(max_steps=8, stop_after_step=3)[-1]
    assert not any("nothing was trained" in line for line in told(max_steps=7))


def test_what_killed_writers_left_is_removed(tiny, data: Path, tmp_path: Path) -> None:
    model = tiny("tiny-dense")
    assert main(short(model, data, tmp_path, ema_decay=0.9)) == 0
    folders = [".saving-x", ".merged-x", ".replay-x", "checkpoint-9.partial", "ema/.saving-y"]
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    file = tmp_path / ".adapter_model.safetensors.partial"
    file.write_bytes(b"half")
    with checkpoint.locked(tmp_path):
        left = [name for name in folders if (tmp_path / name).exists()]
    assert not left and not file.exists()
    assert checkpoint.has_model(tmp_path / "ema")


def test_changed_inputs_are_noticed(tiny, data: Path, tmp_path: Path, capsys) -> None:
    model = Path(shutil.copytree(tiny("tiny-dense"), tmp_path / "base"))
    file = Path(shutil.copy(data / "train.jsonl", tmp_path / "train.jsonl"))
    output, text = tmp_path / "run", file.read_text()
    more = {"train_dataset_path": file, "max_steps": 2}
    assert main(short(model, data, output, **more)) == 0
    more["max_steps"] = 4

    def refused(told: str) -> None:
        capsys.readouterr()
        assert main(short(model, data, output, **more)) == 2
        error = capsys.readouterr().err
        assert told in error and "ignore_changed_inputs=true" in error and error.count("\n") == 1

    file.write_text(text.replace("It is", "It was", 1))
    refused(f"{file} has {len(text) + 1:,} bytes")
    file.write_text(text.replace("It is", "It iz", 1))
    refused(f"{file} has {len(text):,} bytes")
    file.write_text(text)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    refused("the chat template has the digest")
    assert main(short(model, data, output, **more, ignore_changed_inputs=True)) == 0

    moved = model.rename(tmp_path / "moved")  # and now the digests are those of the last start
    capsys.readouterr()
    assert main(["resume", str(output), f"model_name_or_path={moved}", "max_steps=5"]) == 2
    assert "where it is the same model in another place" in capsys.readouterr().err
    words_ = [f"model_name_or_path={moved}", "max_steps=5", "ignore_changed_inputs=true"]
    assert main(["resume", str(output), *words_]) == 0


def test_a_base_whose_weights_have_changed_is_noticed(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    base = Path(shutil.copytree(tiny("tiny-dense"), tmp_path / "base"))
    output = tmp_path / "run"
    assert main(short(base, data, output, max_steps=2)) == 0
    for path in base.iterdir():
        os.utime(path, (1, 1))
    assert main(short(base, data, output, max_steps=3)) == 0

    model = ernie.load(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 0.5
    ernie.save(model, base)
    capsys.readouterr()
    assert main(short(base, data, output, max_steps=4)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors of the base model has" in error and error.count("\n") == 1
    assert "ignore_changed_inputs=true" in error
    assert main(short(base, data, output, max_steps=4, ignore_changed_inputs=True)) == 0


def test_a_checkpoint_says_of_the_base_what_it_knows() -> None:
    """One of an earlier version nothing; full training has the weights in the checkpoint itself."""
    now = {"data": [], "tokenizer": "a", "template": None, "base": [["model.safetensors", 9, "b"]]}
    refuse_changes({k: v for k, v in now.items() if k != "base"}, now, Path("checkpoint-1"))
    refuse_changes(now, now | {"base": None}, Path("checkpoint-1"))
    refuse_changes(now | {"base": None}, now, Path("checkpoint-1"))
    more = now | {"base": [["model-1.safetensors", 9, "b"]]}
    with pytest.raises(ConfigError, match=r"has model\.safetensors and had model-1"):
        refuse_changes(more, now, Path("checkpoint-1"))


def test_full_training_goes_on_without_its_base(tiny, data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny("tiny-dense"), tmp_path / "base"))
    more = {"fine_tuning": "Full"}
    assert main(short(base, data, tmp_path / "run", max_steps=2, **more)) == 0
    (base / "model.safetensors").write_bytes(b"")
    assert main(short(base, data, tmp_path / "run", max_steps=3, **more)) == 0


def test_a_start_tells_what_settings_do_not_do(tiny, data: Path, tmp_path: Path, capsys) -> None:
    more = {"max_steps": 1, "warmup_steps": 77, "max_seq_len": 600, "sharding": "stage1"}
    assert main(short(tiny("tiny-dense"), data, tmp_path, **more, num_train_epochs=3)) == 0
    told = capsys.readouterr().out
    (idle,) = re.findall("without effect here: (.*)", told)
    assert {"num_train_epochs", "sharding (one process)"} <= {*idle.split(", ")}
    assert told.count("warning: max_seq_len=600 is more than the 512 positions of the model") == 1
    assert told.count("warning: the warm-up of 77 steps does not end within the 1 of the run") == 1


def test_files_that_the_stage_does_not_read_are_not_looked_at(
    tiny, data: Path, tmp_path: Path
) -> None:
    """A file of settings for UPO with pairs serves the SFT before it, which has no pairs yet."""
    unread = {"pair_dataset_path": tmp_path / "pairs.jsonl", "stage": "SFT"}
    assert main(short(tiny("tiny-dense"), data, tmp_path / "out", **unread)) == 0


def test_large_files_are_sampled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "_STRETCH", 4)
    monkeypatch.setattr(inputs, "_NUM_STRETCHES", 8)
    file = tmp_path / "file"
    content = bytes(range(100)) * 2
    file.write_bytes(content)
    before = inputs._digest(file)
    seen = 0
    for place in range(len(content)):
        file.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        seen += inputs._digest(file) != before
        assert place not in (0, len(content) - 1) or inputs._digest(file) != before
    assert seen == 8 * 4
    file.write_bytes(content[:32])  # small: all of it
    before = inputs._digest(file)
    for place in range(32):
        file.write_bytes(content[:place] + b"\xff" + content[place + 1 : 32])
        assert inputs._digest(file) != before


def test_a_run_that_was_ended_before_its_first_record_is_known_again(
    tiny, data: Path, tmp_path: Path, monkeypatch
) -> None:
    arguments = short(tiny("tiny-dense"), data, tmp_path / "run", max_steps=1)
    rewind = Metrics.rewind

    def ended(self: Metrics, step: int) -> None:
        rewind(self, step)
        sys.exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "rewind", ended)
        with pytest.raises(SystemExit):
            main(arguments)
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert main(arguments) == 0
