"""Does UPO learn more than PPO or DPO alone?

    python benchmarks/effects_upo.py [--rounds 40] [--seeds 1,2,3] [--warm 20] [--folder DIR]

One supervised warm start of SmolLM2-135M (LoRA, merged) on sums of two numbers of two digits,
tasks of reasoning-gym (SFT); pairs of a right answer and a wrong one of that model; and from it,
for every seed, as many rounds of PPO on drawn answers plus mu times DPO on the pairs (offline UPO),
of PPO only and of DPO only. The number that counts is the share of right greedy answers to held-out
tasks.
Methods are compared task by task and seed by seed; the error of a difference is that of both
together, as if tasks and seeds varied apart. A run that is there already is not made again, so the
script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import ROOT, smollm2_gguf, write_record

from erniekit.data.tasks import Tasks

QUESTION = __doc__.splitlines()[0]
CONFIG = ROOT / "examples/configs/SmolLM2-135M/upo/run_upo_offline.yaml"
TASKS = "chain_sum?min_terms=2&max_terms=2&min_digits=2&max_digits=2"
TRAINING = TASKS + "&size=4000&seed=1"
# Task i of seed s is task 0 of seed s + i: seeds that are near each other give the same tasks.
HELD_OUT = TASKS + "&size=800&seed=100001"
METHODS: dict[str, dict[str, Any]] = {
    "UPO": {},
    "PPO only": {"upo_mu": 0, "pair_dataset_path": ""},  # without effect
    "DPO only": {"policy_loss": "none", "upo_mu": 1.0, "num_generations": 2},  # not learnt from
}
START = "SFT"

Right = dict[str, bool]  # of each held-out task: whether the answer is right
Numbers = dict[str, float]


# --- runs ---


def erniekit(verb: str, *words: str) -> None:
    _call("-m", "erniekit.cli", verb, *words)


def _call(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}")


def words_of(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def warm_start(folder: Path, steps: int) -> Path:
    """The merged model after a little supervised training on the same kind of task."""
    base, output = folder / "SmolLM2-135M", folder / "warm"
    if not base.is_dir():
        erniekit("import-gguf", str(smollm2_gguf()), str(base))
    merged = output / "export"
    if not (merged / "config.json").is_file():
        settings = {
            "model_name_or_path": base, "stage": "SFT", "max_steps": steps, "max_seq_len": 256,
            "learning_rate": 1e-3, "lr_scheduler_type": "linear", "evaluation_strategy": "no",
            "save_strategy": "no", "output_dir": output,
        }  # fmt: skip
        erniekit("train", str(CONFIG), *words_of(settings))
        erniekit("export", f"model_name_or_path={base}", f"output_dir={output}")
    return merged


def pairs_of(model: Path, file: Path) -> Path:
    if not file.is_file():
        _call("examples/data/make_task_pairs.py", str(model), TRAINING, str(file), "--tasks", "400")
    return file


def asked(output: Path, settings: dict[str, Any]) -> Right:
    """What is right after the run in `output`, or before any where there is none."""
    answers = output / "held_out.jsonl"
    if not answers.is_file():
        more = {"eval_dataset_path": HELD_OUT, "output_dir": output, "num_answers": 0}
        erniekit("eval", str(CONFIG), *words_of(settings | more))
    return {f"{i}: {r['question']}": r["rewards"][0] == 1 for i, r in enumerate(_records(answers))}


def trained(output: Path, settings: dict[str, Any]) -> Numbers:
    """Of a run: training's reward at its ends, and its seconds."""
    if not (output / "adapter_config.json").is_file():
        more = {"output_dir": output, "evaluation_strategy": "no", "save_strategy": "no"}
        erniekit("train", str(CONFIG), *words_of(settings | more))
    records = _records(output / "metrics.jsonl")
    rewards = [r["reward"] for r in records if "reward" in r]
    tail = max(len(rewards) // 5, 1)
    return {
        "train_reward_first": mean(rewards[:tail]),
        "train_reward_last": mean(rewards[-tail:]),
        "seconds": sum(r.get("seconds", 0.0) for r in records),
    }


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def new_among(asked: Right) -> list[str]:
    """Those of the held-out tasks that stand nowhere in the file that everything is trained on."""
    tasks = Tasks(TRAINING)
    known = {tasks[i]["messages"][0]["content"] for i in range(len(tasks))}
    return [task for task in asked if task.split(": ", 1)[1] not in known]


# --- differences ---


def difference(ours: Sequence[Right], theirs: Sequence[Right]) -> tuple[float, float]:
    """Points that `ours` has more right, mean over seeds and tasks, and their standard error.

    The variance is the sum of that of the mean of seeds (over tasks) and of that of the mean of
    tasks (over seeds).
    """
    by_seed = [[100 * (a[task] - b[task]) for task in a] for a, b in zip(ours, theirs, strict=True)]
    of_tasks, of_seeds = [mean(column) for column in zip(*by_seed)], [mean(row) for row in by_seed]
    variance = sum(stdev(part) ** 2 / len(part) for part in (of_tasks, of_seeds) if len(part) > 1)
    return mean(of_seeds), sqrt(variance)


# --- the record ---


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--warm", type=int, default=20, help="steps of the warm start")
    parser.add_argument("--folder", type=Path, help="where runs are kept; none: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, (args.folder or Path(temporary)).resolve())


def measure(args: argparse.Namespace, folder: Path) -> None:
    model = warm_start(folder, args.warm)
    pairs = pairs_of(model, folder / "pairs.jsonl")
    common = {"model_name_or_path": model, "pair_dataset_path": pairs, "max_steps": args.rounds}
    start = asked(folder / "start", common)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    numbers: dict[str, list[Numbers]] = {name: [] for name in METHODS}
    right: dict[str, list[Right]] = {START: [start] * len(seeds)} | {name: [] for name in METHODS}
    for seed in seeds:  # methods take turns
        for name, own in METHODS.items():
            output = folder / f"{name.lower().replace(' ', '-')}-{seed}"
            settings = common | own | {"seed": seed}
            numbers[name].append(trained(output, settings))
            right[name].append(asked(output, settings))
            share = 100 * mean(right[name][-1].values())
            print(f"{name} {seed}: {share:.1f} %", numbers[name][-1], file=sys.stderr, flush=True)
    report(args, seeds, right, new_among(start), numbers)


def report(
    args: argparse.Namespace,
    seeds: list[int],
    right: Mapping[str, Sequence[Right]],
    new: Sequence[str],
    numbers: Mapping[str, Sequence[Numbers]],
) -> None:
    header = ["method", "right", "by seed", "UPO has more", "of new tasks", "UPO has more of them",
              "reward in training"]  # fmt: skip
    rows, told = [header], []
    for name, runs in right.items():
        shares = [_share(run) for run in runs]
        of_new, upo_of_new = (
            [{task: run[task] for task in new} for run in side] for side in (runs, right["UPO"])
        )
        by_seed = ", ".join(f"{100 * share:.1f}" for share in shares) if name != START else ""
        more, more_new = (
            "" if name == "UPO" else "{:.1f} ± {:.1f} points".format(*difference(*sides))
            for sides in ((right["UPO"], runs), (upo_of_new, of_new))
        )
        first, last = (
            mean(run[f"train_reward_{end}"] for run in numbers[name]) if name in numbers else 0.0
            for end in ("first", "last")
        )
        reward = f"{first:.3f} to {last:.3f}" if name in numbers else ""
        share, new_share = (f"{100 * mean(map(_share, part)):.1f} %" for part in (runs, of_new))
        rows.append([name, share, by_seed, more, new_share, more_new, reward])
        if more:
            told.append(f"{more} more than {name} ({more_new} of the new tasks)")
    reading = (
        f"After {args.rounds} rounds UPO has {100 * mean(map(_share, right['UPO'])):.1f} % of "
        f"{len(right['UPO'][0])} held-out tasks right: {', '.join(told)} (standard errors over "
        f"{len(seeds)} seeds and the tasks). New are the {len(new)} that stand nowhere in the "
        "training file."
    )
    write_record(
        "effects_upo",
        QUESTION,
        f"python benchmarks/effects_upo.py --rounds {args.rounds} --seeds {args.seeds} "
        f"--warm {args.warm}",
        {"rounds": args.rounds, "seeds": seeds, "warm_steps": args.warm, "held_out": HELD_OUT,
         "config": str(CONFIG.relative_to(ROOT)), "methods": METHODS},
        {"right": {name: [_marks(run) for run in runs] for name, runs in right.items()},
         "training": numbers},
        rows,
        reading,
    )  # fmt: skip


def _share(run: Right) -> float:
    return mean(run.values())


def _marks(run: Right) -> str:
    """1 for each held-out task that is right, in order."""
    return "".join(str(int(value)) for value in run.values())


if __name__ == "__main__":
    main()
