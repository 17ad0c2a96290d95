"""The verbs that write models: what they replace, and reward heads on their way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ernie
from ernie.config import ErnieConfig
from erniekit import reward_model
from erniekit.cli import main

IDS = [[5, 9, 3, 77], [8, 2]]


@pytest.fixture
def model(tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("tiny-dense"), tmp_path / "model"))


def scored(name: str, folder: Path, seed: int) -> Path:
    """A reward model, as training leaves it."""
    model = ernie.load(name, dtype=torch.float32)
    reward_model.add_reward_head(model, seed=seed)
    head_1D = model.get_parameter(reward_model.HEAD).detach()
    del model.score
    ernie.save(model, folder)
    reward_model.write_head(folder, head_1D)
    return folder


@pytest.fixture
def scorers(tiny, tmp_path: Path) -> list[Path]:
    return [scored(tiny("tiny-dense"), tmp_path / f"scorer{seed}", seed) for seed in (1, 2)]


@pytest.mark.parametrize("verb", ["quantize", "upcycle"])
def test_a_name_on_the_hub_stands_for_its_folder(
    verb: str, model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("ernie.checkpoint.hub._fetch", lambda name: model)
    more = ["num_shared_experts=1"] if verb == "upcycle" else []
    assert main([verb, "baidu/ERNIE-4.5-0.3B-PT", str(tmp_path / "made"), *more]) == 0
    assert (tmp_path / "made/config.json").is_file()


def test_a_result_replaces_its_like_and_nothing_else_unasked(
    model: Path, tmp_path: Path, capsys
) -> None:
    made = tmp_path / "made"
    quantised = ["quantize", str(model), str(made)]
    for _ in range(2):
        assert main([*quantised, "quantization=wint8"]) == 0
    (made / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    upcycled = ["upcycle", str(model), str(made), "num_shared_experts=1"]
    assert main(upcycled) == 2
    assert f"the target {made} holds a model; give another one, or" in capsys.readouterr().err
    assert "quantization_config" in ErnieConfig.from_folder(made).extra
    assert main([*upcycled, "overwrite=true"]) == 0
    assert ernie.load(made).config.is_moe and not (made / "chat_template.jinja").exists()
    assert not list(tmp_path.rglob(".making-*"))

    # What was written to since is no result any more.
    ernie.save(ernie.load(model), made)
    assert main(upcycled) == 2
    (model.parent / "run/checkpoint-3").mkdir(parents=True)
    assert main(["upcycle", str(model), str(tmp_path / "run")]) == 2
    assert "run holds checkpoints of a run" in capsys.readouterr().err


def test_a_refused_or_failed_verb_leaves_its_target(model: Path, tmp_path: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert main(["quantize", str(model), str(model), "overwrite=true"]) == 2
    assert "is read and cannot be the target too" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["quantize", str(model), str(other)]) == 0
    assert main(["upcycle", str(other), str(model), "overwrite=true", "num_shared_experts=6"]) == 2
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert main(["upcycle", str(model), str(tmp_path / "new"), "num_shared_experts=6"]) == 2
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".making-*"))


def test_gguf_files_and_folders_are_not_replaced_unasked(
    model: Path, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    assert main(["export-gguf", str(model), str(file)]) == 2
    assert "model.gguf is a file that exists" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["export-gguf", str(model), str(file), "overwrite=true"]) == 0
    assert main(["import-gguf", str(file), str(model)]) == 2
    assert "holds a model" in capsys.readouterr().err
    assert main(["import-gguf", str(file), str(file), "overwrite=true"]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["quantize", "upcycle"])
def test_a_reward_head_goes_where_its_model_goes(verb, scorers, tiny, tmp_path: Path) -> None:
    made, more = tmp_path / "made", ["num_shared_experts=1"] * (verb == "upcycle")
    assert main([verb, str(scorers[0]), str(made), *more]) == 0
    wanted, found = (
        torch.tensor(reward_model.load(folder, dtype=torch.float32)(IDS))
        for folder in (scorers[0], made)
    )
    worst = (found - wanted).abs().max() / wanted.abs().max()
    assert worst < (0.05 if verb == "quantize" else 1e-4), f"rewards are off by {worst:.1e}"
    # A model without one replaces it whole.
    assert main([verb, str(tiny("tiny-dense")), str(made), *more]) == 0
    assert not reward_model.has_head(made)


def test_reward_models_are_merged_with_their_heads(scorers, tiny, tmp_path: Path, capsys) -> None:
    one, two = map(str, scorers)
    made = tmp_path / "made"
    assert main(["merge", one, two, str(made), "weights=1,3"]) == 0
    heads = [reward_model.read_head(folder) for folder in (*scorers, made)]
    assert torch.allclose(heads[2], 0.25 * heads[0] + 0.75 * heads[1])
    assert len(reward_model.load(made)(IDS)) == 2

    plain = str(tiny("tiny-dense"))
    for words in ([one, plain], [one, two, f"base={plain}", "method=ties"]):
        assert main(["merge", *words, str(tmp_path / "no")]) == 2
        told = capsys.readouterr().err
        assert f"scorer1 is a reward model and {plain} is none" in told
    (scorers[1] / reward_model.HEAD_FILE).unlink()
    assert main(["merge", one, two, str(tmp_path / "no")]) == 2
    assert "config.json names a reward head, but" in capsys.readouterr().err
    assert main(["export-gguf", one, str(tmp_path / "no.gguf")]) == 2
    assert "is a reward model, and gguf has no place for its head" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
