"""The pages of docs about training: their commands work, in order, on the tiny model that the first
one makes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from erniekit import config, foreign
from erniekit.cli import main
from erniekit.report.scores import CALL_SCORES, SCORES
from fastdeploy.config import EngineConfig

ROOT = Path(__file__).parents[2]
# Pages, and what their commands leave behind.
PAGES = {
    "training": "full/split_export/model-00002-*.safetensors",
    "data": "checked/data/train.jsonl.bad.jsonl",
    "methods/lora": "pissa/export/peft/adapter_model.safetensors",
}


def text_of(page: str) -> str:
    return (ROOT / f"docs/{page}.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_work_in_order(page: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shell = "set -euo pipefail\n" + "".join(
        f'{name}() {{ "{sys.executable}" {call} "$@"; }}\n'
        for name, call in (("python", ""), ("erniekit", "-m erniekit.cli"))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    blocks = re.findall(r"^```bash\n(.*?)^```$", text_of(page), re.M | re.S)
    assert len(blocks) >= 6
    for block in blocks:
        done = subprocess.run(
            ["bash", "-c", shell + block],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert list(tmp_path.glob(PAGES[page]))


def test_the_plan_in_the_text_is_the_one_that_is_printed(capsys) -> None:
    """All but what was measured: the line of the step's time."""
    command, told = re.search(
        r"^\$ erniekit (.*)\n([^`]*)^```$", text_of("training"), re.M
    ).groups()
    assert main(command.split()) == 1
    lines = [
        [line for line in text.splitlines() if not line.startswith("a step:")]
        for text in (capsys.readouterr().out, told)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_the_text_exist(page: str) -> None:
    words = set(re.findall(r"`([a-z_]+(?:_[a-z]+)+)(?:: [\w.]+)?`", text_of(page)))
    words -= {f.name for f in dataclasses.fields(EngineConfig)}
    keys = {f.name for kind in config.GROUPS for f in dataclasses.fields(kind)}
    metrics = {"moe_max_over_mean", "full_attn", "dare_ties", "rewards_accuracy", "rewards_margin"}
    metrics |= {"q_proj", "self_attn", "shared_experts", "target_parameters"}
    metrics |= {"rewards_chosen", "rewards_rejected", "eval_loss"} | {*SCORES, *CALL_SCORES}
    metrics |= {"reasoning_content", "tool_call_id", "matched_text_index"}  # parts of records
    unknown = words - keys - metrics - foreign.RENAMED.keys() - foreign.WITHOUT_EFFECT.keys()
    assert not unknown, f"docs/{page}.md names {sorted(unknown)}"
