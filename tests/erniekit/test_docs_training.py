"""docs/training.md: its commands work, in order, on the tiny model that the first one makes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from erniekit import config, foreign

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/training.md").read_text("utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)


def test_commands_work_in_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shell = "set -euo pipefail\n" + "".join(
        f'{name}() {{ "{sys.executable}" {call} "$@"; }}\n'
        for name, call in (("python", ""), ("erniekit", "-m erniekit.cli"))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert len(BLOCKS) >= 8
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-c", shell + block],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert len(list((tmp_path / "full/split_export").glob("*.safetensors"))) > 1


def test_settings_in_the_text_exist() -> None:
    words = set(re.findall(r"`([a-z_]+(?:_[a-z]+)+)(?:: [\w.]+)?`", TEXT))
    keys = {f.name for kind in config.GROUPS for f in dataclasses.fields(kind)}
    metrics = {"moe_max_over_mean", "full_attn", "dare_ties", "rewards_accuracy", "rewards_margin"}
    metrics |= {"rewards_chosen", "rewards_rejected", "eval_loss"}
    unknown = words - keys - metrics - foreign.RENAMED.keys() - foreign.WITHOUT_EFFECT.keys()
    assert not unknown, f"docs/training.md names {sorted(unknown)}"
