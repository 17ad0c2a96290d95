"""What is lost when a training is killed, told to stop, or finds the disk full, at any moment?

    python benchmarks/faults/kill_training.py [--kills 50] [--stops 10] [--full 30]

Kills (SIGKILL, half of them in LoRA, half in Full with saves beside the training) and full disks
come at file operations drawn at random among all of a run: logs, checkpoints, pointers, pages, the
final model, each write half done. SIGTERM comes at random times. Each run is then started again to
its end and compared with an unbroken one.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rig
from harness import ROOT

sys.path.insert(0, str(ROOT))

from erniekit import checkpoint
from examples.tiny_model import make
from tests.helpers_faults import Ended, Runs, forked_runs

SAVE_STEPS = 2
NUM_STEPS = 6
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "total_tokens", "eval_loss")


class Trial:
    """Runs of one kind; `unbroken` is what each of them must end with."""

    def __init__(self, runs: Runs, root: Path, *, is_async: bool) -> None:
        self.runs, self.root, self.is_async, self.count = runs, root, is_async, 0
        self.seconds = time.monotonic()
        output = self.fresh()
        self.whole = self.run(output)
        self.seconds = time.monotonic() - self.seconds
        assert not self.whole.status, self.whole.told
        self.unbroken = result(output)

    def fresh(self) -> Path:
        self.count += 1
        return self.root / f"{'async' if self.is_async else 'sync'}-{self.count}"

    def run(self, output: Path, at: float = 0, fault: str = "kill") -> Ended:
        values = {
            "model_name_or_path": self.root / "tiny",
            "train_dataset_path": ROOT / "examples/data/sft-train.jsonl",
            "eval_dataset_path": ROOT / "examples/data/sft-eval.jsonl",
            "output_dir": output, "use_async_save": self.is_async,
            "fine_tuning": "Full" if self.is_async else "LoRA", "max_steps": NUM_STEPS,
            "save_steps": SAVE_STEPS, "save_total_limit": 2, "evaluation_strategy": "steps",
            "eval_steps": SAVE_STEPS, "max_evaluate_steps": 1, "num_answers": 0, "ema_decay": 0.9,
            "max_seq_len": 96, "buffer_size": 20, "learning_rate": 1e-2,
        }  # fmt: skip
        words = ["train", *(f"{key}={value}" for key, value in values.items())]
        return self.runs.run(words, output, at=at, fault=fault)

    def is_equal_after_restart(self, output: Path) -> bool:
        again = self.run(output)
        is_equal = not again.status and result(output) == self.unbroken
        shutil.rmtree(output)
        return is_equal


def result(output: Path) -> tuple:
    """The loss curve and every byte of the last checkpoint's tensors and the final adapter."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    curve = [tuple(json.loads(line).get(key) for key in NUMBERS) for line in lines]
    files = sorted(output.glob(f"checkpoint-{NUM_STEPS}/**/*.safetensors"))
    files += sorted(output.glob("*.safetensors")) + sorted(output.glob("ema/*.safetensors"))
    return curve, [(str(f.relative_to(output)), f.read_bytes()) for f in files]


def num_damaged(output: Path) -> int:
    """Folders with the final name of a checkpoint that are not whole."""
    return sum(bool(checkpoint.what_is_wrong(f)) for _, f in checkpoint.checkpoints(output))


def num_lost(output: Path) -> int:
    """Steps that were recorded and are to be made again."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [int(found[1]) for line in lines if (found := re.match(r'{"step": (\d+)', line))]
    whole = checkpoint.newest_good(output)
    return max(steps, default=0) - (int(whole.name.rpartition("-")[2]) if whole else 0)


def killed(trial: Trial, count: int) -> tuple[int, int, int]:
    """Runs that ended differently, damaged folders, and the most steps lost."""
    num_different = damaged = 0
    lost = [0]
    for at in random.Random(1).sample(range(1, trial.whole.operations), count):
        output = trial.fresh()
        assert trial.run(output, at).status == -9, at
        damaged += num_damaged(output)
        lost.append(num_lost(output))
        num_different += not trial.is_equal_after_restart(output)
        print(f"killed at {at}: {num_different} of {len(lost) - 1} differ", file=sys.stderr)
    return num_different, damaged, max(lost)


def stopped(trial: Trial, count: int) -> tuple[int, int]:
    """Runs told to stop that ended with another status than they should, or differently."""
    num_wrong = num_different = 0
    for _ in range(count):
        output = trial.fresh()
        ended = trial.run(output, random.uniform(0, trial.seconds), "term")
        # Before the first step and after the last one there is nothing to save: it just ends.
        is_stopped = ended.status == 0 and "stopping after this step" in ended.told
        num_wrong += not (is_stopped or ended.status in (0, -15))
        num_wrong += is_stopped and not checkpoint.newest_good(output)
        num_different += not trial.is_equal_after_restart(output)
    return num_wrong, num_different


def filled(trial: Trial, count: int) -> tuple[int, int, int]:
    """Runs that found the disk full and ended without a sentence, damaged folders, different."""
    num_silent = damaged = num_different = 0
    last = trial.whole.operations
    for at in random.Random(2).sample(range(1, last), min(count, last - 1)):
        output = trial.fresh()
        ended = trial.run(output, at, "full")
        sentence = ended.told.strip().splitlines()[-1] if ended.told.strip() else ""
        is_told = "the disk of" in sentence and "Traceback" not in ended.told
        num_silent += not (ended.status == 3 and is_told)
        damaged += num_damaged(output)
        num_different += not trial.is_equal_after_restart(output)
    return num_silent, damaged, num_different


@contextmanager
def trials() -> Iterator[tuple[Trial, Trial]]:
    with tempfile.TemporaryDirectory() as name, forked_runs() as runs:
        make(Path(name) / "tiny")
        yield Trial(runs, Path(name), is_async=False), Trial(runs, Path(name), is_async=True)


def run(kills: int, stops: int, full: int) -> list[rig.Claim]:
    with trials() as (sync, beside):
        different, damaged, lost = killed(sync, kills - kills // 2)
        different_beside, damaged_beside, lost_beside = killed(beside, kills // 2)
        wrong, different_stopped = stopped(beside, stops)
        silent, damaged_full, different_full = filled(sync, full)
    return [
        rig.Claim("LoRA killed, ended differently from the unbroken run", different, 0),
        rig.Claim("Full with saves beside it killed, ended differently", different_beside, 0),
        rig.Claim("damaged checkpoints under a final name", damaged + damaged_beside, 0),
        rig.Claim("most steps recorded and lost", lost, SAVE_STEPS, "steps"),
        rig.Claim("the same, saves beside the training", lost_beside, 2 * SAVE_STEPS, "steps"),
        rig.Claim("SIGTERM: wrong status, or no checkpoint", wrong, 0),
        rig.Claim("SIGTERM: ended differently when resumed", different_stopped, 0),
        rig.Claim("disk full: no sentence, or a traceback", silent, 0),
        rig.Claim("disk full: damaged checkpoints", damaged_full, 0),
        rig.Claim("disk full: ended differently when resumed", different_full, 0),
    ]


if __name__ == "__main__":
    settings = {"kills": 50, "stops": 10, "full": 30}
    raise SystemExit(rig.script("kill_training", __doc__, settings, run))
