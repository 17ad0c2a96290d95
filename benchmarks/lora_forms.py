"""What do the forms of LoRA, and frozen weights in few bits, reach in the same steps?

    python benchmarks/lora_forms.py [--seeds 1] [--forms LoRA,DoRA] [--steps 60]

The model is SmolLM2-135M-Instruct, trained with the example file of supervised fine-tuning; a form
is a few words behind it. Every run is a command that anyone can type. The loss is that of the
held-out answers, before and after: where weights are in few bits, the one before tells what that
alone costs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import ROOT, smollm2_gguf, words_of, write_record

QUESTION = __doc__.splitlines()[0]
CONFIG = "examples/configs/SmolLM2-135M/sft/run_sft_lora.yaml"
FORMS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "LoRA+": {"lora_plus_scale": 4},
    "DoRA": {"use_dora": True},
    "PiSSA": {"pissa": True},
    "LoRA beside wint8": {"compute_type": "wint8"},
    "LoRA beside nf4": {"compute_type": "nf4"},
    "PiSSA beside nf4": {"compute_type": "nf4", "pissa": True},
}

Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--forms", help="some of them, by comma", default="")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    forms = args.forms.split(",") if args.forms else list(FORMS)
    results: dict[str, list[Numbers]] = {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        erniekit("import-gguf", smollm2_gguf(), folder / "base")
        for form in forms:
            for seed in args.seeds.split(","):
                output = folder / f"out-{form}-{seed}".replace(" ", "-").replace(",", "")
                settings = {
                    "model_name_or_path": folder / "base", "output_dir": output, "seed": seed,
                    "max_steps": args.steps, "eval_steps": args.steps, **FORMS[form],
                }  # fmt: skip
                erniekit("train", CONFIG, *words_of(settings))
                results[form].append(numbers_of(output))
                print(form, seed, results[form][-1], file=sys.stderr, flush=True)
    report(results, args)


def erniekit(*words: Any) -> None:
    command = [sys.executable, "-m", "erniekit.cli", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def numbers_of(output: Path) -> Numbers:
    from safetensors import safe_open

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return {
        "start": losses[0],
        "loss": losses[-1],
        "trained": sum(math.prod(shape) for shape in shapes),
        "peak_memory_gib": max(line.get("peak_memory_gib", 0.0) for line in lines),
    }


def report(results: dict[str, list[Numbers]], args: argparse.Namespace) -> None:
    table = [["form", "trained", "held-out loss, start", "held-out loss, end", "peak memory, GiB"]]
    for form, runs in results.items():
        losses = [run["loss"] for run in runs]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        memory = mean(run["peak_memory_gib"] for run in runs)
        table.append(
            [
                form, f"{runs[0]['trained'] / 1e6:.2f} M", f"{runs[0]['start']:.3f}",
                f"{mean(losses):.3f}{spread}", f"{memory:.2f}",
            ]
        )  # fmt: skip
    by_loss = sorted(results, key=lambda form: mean(run["loss"] for run in results[form]))
    reading = f"Least held-out loss after {args.steps} steps: {by_loss[0]}; most: {by_loss[-1]}."
    words = f"--seeds {args.seeds} --steps {args.steps}"
    words += f" --forms '{args.forms}'" if args.forms else ""
    write_record(
        "lora_forms", QUESTION, f"python benchmarks/lora_forms.py {words}",
        {"model": "SmolLM2-135M-Instruct", "config": CONFIG, "steps": args.steps,
         "seeds": args.seeds, "forms": {form: FORMS[form] for form in results}},
        results, table, reading,
    )  # fmt: skip


if __name__ == "__main__":
    main()
