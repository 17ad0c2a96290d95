"""Does UPO learn more than PPO or DPO alone?

    python benchmarks/effects_upo.py [--rounds 40] [--seeds 1,2,3] [--warm 20] [--folder DIR]

One supervised warm start of SmolLM2-135M (LoRA, merged) on sums of small numbers that reasoning-gym
makes (SFT); pairs of a right answer and a wrong one of that model; and from it, for every seed, as
many rounds of PPO on drawn answers plus mu times DPO on the pairs (offline UPO), of PPO only and of
DPO only. The number that counts is the share of right greedy answers to held-out tasks. Methods are
compared task by task and seed by seed; the error of a difference is that of both together, as if
tasks and seeds varied apart. A run that is there already is not made again, so the script goes on
where it was stopped.
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

QUESTION = __doc__.splitlines()[0]
CONFIG = ROOT / "examples/configs/SmolLM2-135M/upo/run_upo_offline.yaml"
TASKS = "chain_sum?min_terms=2&max_terms=3&max_digits=1"
HELD_OUT = TASKS + "&size=400&seed=5"  # of no run by which settings were chosen
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
        tasks = TASKS + "&size=4000&seed=1"
        _call("examples/data/make_task_pairs.py", str(model), tasks, str(file), "--tasks", "400")
    return file


def asked(output: Path, settings: dict[str, Any]) -> Right:
    """What is right after the run in `output`, or before any where there is none."""
    answers = output / "held_out.jsonl"
    if not answers.is_file():
        more = {"eval_dataset_path": HELD_OUT, "output_dir": output, "num_answers": 0}
        erniekit("eval", str(CONFIG), *words_of(settings | more))
    return {f"{r['where']}: {r['question']}": r["rewards"][0] == 1 for r in _records(answers)}


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


def seen(pairs: Path, outputs: Sequence[Path]) -> set[str]:
    """Questions that any run was trained on, in a prompt or a pair."""
    rollouts = [record for output in outputs for record in _records(output / "rollouts.jsonl")]
    return {r["src"][0] for r in _records(pairs)} | {r["question"] for r in rollouts}


# --- differences ---


def difference(ours: Sequence[Right], theirs: Sequence[Right]) -> tuple[float, float]:
    """Mean over seeds and tasks of what `ours` has more right, and its standard error.

    The variance is the sum of that of the mean of seeds (over tasks) and of that of the mean of
    tasks (over seeds).
    """
    by_seed = [[a[task] - b[task] for task in a] for a, b in zip(ours, theirs, strict=True)]
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
    outputs = []
    for seed in seeds:  # methods take turns
        for name, own in METHODS.items():
            output = folder / f"{name.lower().replace(' ', '-')}-{seed}"
            settings = common | own | {"seed": seed}
            numbers[name].append(trained(output, settings))
            right[name].append(asked(output, settings))
            outputs.append(output)
            share = 100 * mean(right[name][-1].values())
            print(f"{name} {seed}: {share:.1f} %", numbers[name][-1], file=sys.stderr, flush=True)
    known = seen(pairs, outputs)
    new = [task for task in start if task.split(": ", 1)[1] not in known]
    report(args, seeds, right, new, numbers)


def report(
    args: argparse.Namespace,
    seeds: list[int],
    right: Mapping[str, Sequence[Right]],
    new: Sequence[str],
    numbers: Mapping[str, Sequence[Numbers]],
) -> None:
    header = ["method", "right", "by seed", "of new tasks", "reward in training", "UPO has more"]
    rows, told = [header], []
    for name, runs in right.items():
        shares = [mean(run.values()) for run in runs]
        new_share = mean(run[task] for run in runs for task in new) if new else float("nan")
        by_seed = ", ".join(f"{100 * share:.1f}" for share in shares) if name != START else ""
        gain, error = difference(right["UPO"], runs)
        more = "" if name == "UPO" else f"{100 * gain:.1f} ± {100 * error:.1f} points"
        first, last = (
            mean(run[f"train_reward_{end}"] for run in numbers[name]) if name in numbers else 0.0
            for end in ("first", "last")
        )
        reward = f"{first:.3f} to {last:.3f}" if name in numbers else ""
        share = f"{100 * mean(shares):.1f} %"
        rows.append([name, share, by_seed, f"{100 * new_share:.1f} %", reward, more])
        if more:
            told.append(f"{100 * gain:.1f} ± {100 * error:.1f} points more than {name}")
    reading = (
        f"After {args.rounds} rounds UPO has {100 * mean(map(_share, right['UPO'])):.1f} % of "
        f"{len(right['UPO'][0])} held-out tasks right: {', '.join(told)} (standard errors over "
        f"{len(seeds)} seeds and the tasks). New are the {len(new)} tasks that no run saw."
    )
    write_record(
        "effects_upo",
        QUESTION,
        "python benchmarks/effects_upo.py " + " ".join(sys.argv[1:]),
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
