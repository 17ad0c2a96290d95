"""Does a mixture of experts made from a dense model overtake it on held-out text when both go on?

    python benchmarks/pretrain.py --folder FOLDER
    python benchmarks/upcycled.py --folder FOLDER [--steps 200]

The parent is the dense twin that `pretrain.py` leaves in FOLDER. Three models read the same tokens
from there: the parent; its experts with one of eight chosen, which keeps the number of active
parameters; and with two chosen, the published form, which has a third more in its feed-forward
layers. All use the same schedule. At the first step all three compute the same function.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, write_record
from pretrain import LANGUAGES, evaluated, sizes, steps_of, table_of, words

QUESTION = __doc__.splitlines()[0]
CHOSEN = {"dense parent": 0, "upcycled, 1 of 8": 1, "upcycled, 2 of 8": 2}
EXPERTS = ("num_experts=8", "num_shared_experts=2")
GOING_ON = ("learning_rate=1e-3", "min_lr=1e-4", "warmup_steps=10", "seed=31", "save_steps=100000")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    parent = args.folder / "out-dense"
    if not (parent / "model.safetensors").exists():
        sys.exit(
            f"{parent} holds no model; run benchmarks/pretrain.py with the same --folder first"
        )
    results = {}
    for side, top_k in CHOSEN.items():
        start = parent if not top_k else args.folder / f"upcycled-{top_k}"
        if top_k:
            erniekit("upcycle", parent, start, *EXPERTS, f"top_k={top_k}")
        results[side] = gone_on(args.folder, start, args.steps)
        print(side, results[side]["bits_per_byte"], file=sys.stderr, flush=True)
    report(results, args.steps)


def erniekit(*command: Any) -> None:
    whole = [sys.executable, "-m", "erniekit.cli", *map(str, command)]
    subprocess.run(whole, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def gone_on(folder: Path, start: Path, steps: int) -> Record:
    """A model trained on from `start`, and what it is then."""
    output = folder / f"gone-on-{start.name}"
    kind = "dense" if start.name == "out-dense" else "moe"
    settings = [
        *words(folder, kind), f"model_name_or_path={start}", f"output_dir={output}",
        "continue_training=true", f"max_steps={steps}", *GOING_ON,
    ]  # fmt: skip
    erniekit("train", *settings)
    trained, _ = steps_of(output)
    return {
        "bits_per_byte": evaluated(settings, folder, output),
        "tokens": trained[-1]["total_tokens"],
        "busiest": trained[-1].get("moe_max_over_mean"),
        "dead": trained[-1].get("moe_dead_experts"),
        **sizes(output),
    }


def report(results: dict[str, Record], steps: int) -> None:
    more = {
        "busiest expert over the mean": lambda r: f"{r['busiest']:.2f}" if r["busiest"] else "",
        "experts without a token": lambda r: "" if r["dead"] is None else f"{r['dead']:.0f}",
    }
    table = table_of(results, "tokens since the start", 4, more)
    dense, *others = results
    gains = []
    for side in others:
        ratios = [
            1 - results[side]["bits_per_byte"][n] / results[dense]["bits_per_byte"][n]
            for n in LANGUAGES
        ]
        gains.append(f"{side}: {100 * sum(ratios) / len(ratios):+.2f} %")
    reading = f"Fewer bits a byte than the dense parent after the same tokens: {'; '.join(gains)}."
    write_record(
        "upcycled", QUESTION,
        f"python benchmarks/upcycled.py --folder FOLDER --steps {steps}",
        {"steps": steps, "experts": EXPERTS, "settings": GOING_ON},
        results, table, reading,
    )  # fmt: skip


if __name__ == "__main__":
    main()
