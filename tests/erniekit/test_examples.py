"""The files of examples/configs: every data file that they name is here, and all of it is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ernie.settings import read_yaml
from erniekit.cli import main
from erniekit.config import Run, run_from
from tests.helpers_tokenizer import byte_level_folder, sentencepiece_folder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/configs"
PATHS = (
    "train_dataset_path", "eval_dataset_path", "text_dataset_path", "pair_dataset_path",
    "input_dir",
)  # fmt: skip


def run_of(path: Path) -> Run:
    return run_from(read_yaml(path), path.name)


def named(run: Run) -> set[str]:
    """The data files of a run; those of reasoning_gym are tasks, and prefixes have two files."""
    values, found = run.flat(), set()
    for key in PATHS:
        kinds = values.get(key.replace("_path", "_type"), [])
        given = str(values[key] or "").split()[1::2] if key == "input_dir" else values[key]
        found |= {p for i, p in enumerate(given) if kinds[i : i + 1] != ["reasoning_gym"]}
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_data_that_a_file_names_is_here_or_made_by_a_command_that_it_names(path: Path) -> None:
    comments = " ".join(re.findall(r"^#(.*)$", path.read_text("utf-8"), re.M))
    run = run_of(path)
    for script in re.findall(r"\bexamples/[\w/]+\.py\b", comments):
        assert (ROOT / script).is_file(), script
    for file in named(run):
        made = rf"(python|erniekit data) \S+.*\b{re.escape(file.split('/')[0])}\b"
        assert (ROOT / file).is_file() or re.search(made, comments), file


@pytest.fixture(scope="module")
def model_of(tiny, tmp_path_factory):
    """A function from an example to a folder with a tokenizer of the kind of its model."""
    root = tmp_path_factory.mktemp("kinds")
    thinking = sentencepiece_folder(root / "thinking", thinking=True)
    calls = shutil.copytree(tiny("tiny-dense"), root / "calls")
    shutil.copy(CONFIGS / "ERNIE-4.5-21B-A3B/fc/chat_template.jinja", calls)
    chatml = byte_level_folder(root / "chatml")
    for made in (thinking, chatml):
        shutil.copy(calls / "config.json", made)
    chatml_calls = shutil.copytree(chatml, root / "chatml-calls")
    shutil.copy(CONFIGS / "SmolLM2-135M/fc/chat_template.jinja", chatml_calls)

    def folder(path: Path) -> Path:
        if "SmolLM2" in path.parts[-3]:
            return chatml_calls if path.parent.name == "fc" else chatml
        if path.parent.name == "fc":
            return calls
        if "Thinking" in str(path):
            return thinking
        return tiny("tiny-vl" if "-VL-" in str(path) else "tiny-dense")

    return folder


def different() -> list[Path]:
    """One example for each way in which the data of this repository is read."""
    found = {}
    for path in sorted(CONFIGS.glob("*/*/*.yaml")):
        run = run_of(path)
        files = named(run)
        if files and all((ROOT / file).is_file() for file in files):
            way = (run.model.stage, *sorted(files), "SmolLM2" in str(path), "Thinking" in str(path))
            found.setdefault(way, path)
    return list(found.values())


@pytest.mark.parametrize(
    "path", different(), ids=lambda p: "-".join(p.relative_to(CONFIGS).parts[:2])
)
def test_no_record_of_an_example_is_refused(path, model_of, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [f"model_name_or_path={model_of(path)}", f"output_dir={tmp_path}"]
    words += ["max_seq_len=8192", "preprocessing_num_workers=1"]  # a small vocabulary: more tokens
    assert main(["data", str(path), *words]) == 0
    ledger = json.loads((tmp_path / "data/ledger.json").read_text("utf-8"))
    splits = [ledger[name] for name in ("train", "eval") if name in ledger]
    assert splits
    for split in splits:
        assert split["all"]["num_unusable"] == 0, split["files"]
        assert split["all"]["tokens"]["trained"] > 0 and not split["cut_away"]
    assert not ledger.get("overlap", {}).get("count"), ledger["overlap"]["examples"]


def test_the_template_beside_the_example_is_what_its_data_needs(
    tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = CONFIGS / "ERNIE-4.5-21B-A3B/fc/run_fc_8k.yaml"
    words = [f"model_name_or_path={tiny('tiny-dense')}", f"output_dir={tmp_path}"]
    assert main(["data", str(path), *words, "preprocessing_num_workers=1"]) == 2
    bad = (tmp_path / "data/function-call-train.jsonl.bad.jsonl").read_text("utf-8").splitlines()
    assert len(bad) == 20 and "put a chat_template.jinja" in json.loads(bad[0])["reason"]
