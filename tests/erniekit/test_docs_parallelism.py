"""docs/parallelism.md: its commands work, in order; the formulas of its table are the plan's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ernie.models import MODELS
from erniekit.config import resolved, run_from
from erniekit.plan import Degrees, sizes_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/parallelism.md").read_text("utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
CALLS = {"python": "", "erniekit": "-m erniekit.cli", "torchrun": "-m torch.distributed.run"}


@pytest.mark.ranks
@pytest.mark.slow
def test_commands_work_in_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shell = "set -euo pipefail\n" + "".join(
        f'{name}() {{ "{sys.executable}" {call} "$@"; }}\n' for name, call in CALLS.items()
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-c", shell + block],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8, "the run is to have gone on twice"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stage", ["none", "stage1", "stage2", "stage3"])
def test_formulas_are_those_of_the_plan(stage: str, device: str) -> None:
    config = MODELS["ERNIE-4.5-21B-A3B"].config
    given = {"fine_tuning": "Full", "sharding": stage, "gradient_accumulation_steps": 2}
    run = resolved(run_from(given), device)
    shards = 1 if stage == "none" else 16
    one = sizes_of(config, run, device)
    blocks = [count for layer, count in one.weights.items() if layer >= 0]
    width = 2 if device == "cuda" else 4
    values = {
        "N": one.weights.total() / width,
        "V": one.weights[-1] / width,
        "B": max(blocks) / width,
        "S": shards,
    }
    (row,) = re.findall(rf"^\| `?{stage}`? \| ([^|]*\d[^|]*) \| ([^|]*) \|$", TEXT, re.M)
    formula = row[device == "cpu"]
    expected = eval(re.sub(r"(\d) ?([NBV(])", r"\1 * \2", formula.replace("3B", "3 * B")), values)
    found = sizes_of(config, run, device, Degrees(sharding=shards))
    parts = (found.weights, found.sums, found.state)
    total = sum(part.total() for part in parts) + found.gathered
    # The vocabulary's sum is float32 on a CPU too; owners do not get exactly the same.
    assert total == pytest.approx(expected, rel=0.02), f"{formula}: {expected / total:.4f} of it"
