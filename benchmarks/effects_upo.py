"""Does UPO learn more from the same answers than PPO or DPO alone?

    python benchmarks/effects_upo.py [--rounds 40] [--seeds 1,2] [--warm 20] [--folder DIR]

One supervised warm start of SmolLM2-135M (LoRA, merged) on sums of small numbers that reasoning-gym
makes; from it, for every seed, three runs that draw the same number of answers to the same prompts:
PPO with the advantages of groups plus mu times DPO (UPO), PPO only, and DPO only. The number that
counts is the share of right greedy answers to held-out tasks, before and after. A run that is there
already is not made again, so the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from harness import ROOT, smollm2_gguf, write_record

QUESTION = __doc__.splitlines()[0]
CONFIG = ROOT / "examples/configs/SmolLM2-135M/upo/run_upo.yaml"
METHODS: dict[str, dict[str, Any]] = {
    "UPO": {},
    "PPO only": {"upo_mu": 0},
    "DPO only": {"policy_loss": "none", "upo_mu": 1.0},
}


def erniekit(verb: str, *words: str) -> None:
    command = [sys.executable, "-m", "erniekit.cli", verb, *words]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"erniekit {verb} ended with status {done.returncode}")


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


def trained(model: Path, output: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Held-out numbers before and after a run, the training reward at its ends, and its seconds."""
    own = {
        "model_name_or_path": model, "output_dir": output, "eval_steps": settings["max_steps"],
        "save_strategy": "no",
    }  # fmt: skip
    if not (output / "adapter_config.json").is_file():
        erniekit("train", str(CONFIG), *words_of(settings | own))
    records = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    held_out = [r for r in records if "eval_right" in r]
    rewards = [r["reward"] for r in records if "reward" in r]
    tail = max(len(rewards) // 5, 1)
    return {
        "right_before": held_out[0]["eval_right"],
        "right_after": held_out[-1]["eval_right"],
        "reward_after": held_out[-1]["eval_reward"],
        "train_reward_first": mean(rewards[:tail]),
        "train_reward_last": mean(rewards[-tail:]),
        "kl": records[-1].get("kl", float("nan")),
        "seconds": sum(r.get("seconds", 0.0) for r in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--warm", type=int, default=20, help="steps of the warm start")
    parser.add_argument("--folder", type=Path, help="where runs are kept; none: a temporary one")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE for all runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, (args.folder or Path(temporary)).resolve())


def measure(args: argparse.Namespace, folder: Path) -> None:
    start = time.monotonic()
    model = warm_start(folder, args.warm)
    common = {"max_steps": args.rounds} | dict(word.split("=", 1) for word in args.set)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for seed in seeds:  # methods take turns
        for name, own in METHODS.items():
            output = folder / f"{name.lower().replace(' ', '-')}-{seed}"
            numbers = trained(model, output, common | own | {"seed": seed})
            found[name][str(seed)] = numbers
            print(name, seed, numbers, file=sys.stderr, flush=True)
    means = {
        name: {key: mean(run[key] for run in runs.values()) for key in next(iter(runs.values()))}
        for name, runs in found.items()
    }
    report(args, seeds, found, means, time.monotonic() - start)


def report(
    args: argparse.Namespace,
    seeds: list[int],
    found: dict[str, dict[str, Any]],
    means: dict[str, dict[str, float]],
    seconds: float,
) -> None:
    rows = [["method", "right before", "right after", "by seed", "reward in training", "seconds"]]
    for name, m in means.items():
        by_seed = ", ".join(f"{100 * r['right_after']:.0f}" for r in found[name].values())
        rewards = f"{m['train_reward_first']:.3f} to {m['train_reward_last']:.3f}"
        before, after = (f"{100 * m[key]:.1f} %" for key in ("right_before", "right_after"))
        rows.append([name, before, after, f"{by_seed} %", rewards, f"{m['seconds']:.0f}"])
    after = {name: 100 * m["right_after"] for name, m in means.items()}
    told = ", ".join(f"{name} {value:.1f} %" for name, value in after.items())
    best = max(after, key=lambda name: after[name])
    reading = (
        f"Held-out answers that are right after the same number of samples, mean of {len(seeds)} "
        f"seeds: {told}, from {100 * means['UPO']['right_before']:.1f} %. Most has {best}; with so "
        "few seeds and prompts a difference of a few percent is no difference."
    )
    write_record(
        "effects_upo",
        QUESTION,
        "python benchmarks/effects_upo.py " + " ".join(sys.argv[1:]),
        {"rounds": args.rounds, "seeds": seeds, "warm_steps": args.warm, "set": args.set,
         "config": str(CONFIG.relative_to(ROOT)), "seconds": round(seconds)},
        {"methods": found, "means": means},
        rows,
        reading,
    )  # fmt: skip


if __name__ == "__main__":
    main()
