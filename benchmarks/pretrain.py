"""Does a mixture of experts pre-trained from nothing beat a dense twin of the same active size?

    python benchmarks/pretrain.py [--steps 400] [--folder FOLDER]
    python benchmarks/pretrain.py --redraw      the figures of the newest record, without training

Both read the same tokens of the same English and Chinese documents in the same order, with the
tokenizer that `examples/pretrain_corpus.py` has learnt on them. They train side by side, each on
half of the processors. Held-out text is measured in bits per byte, by language. The figures of the
record are drawn into `docs/images/pretrain.svg`, the samples stand in the record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, write_record

QUESTION = __doc__.splitlines()[0]
SIDES = {"MoE": "moe", "dense twin": "dense"}
LANGUAGES = ("english", "chinese")
PROMPTS = ("The United States is", "Fellow citizens of the Senate", "浣溪沙", "春风")
SAMPLE_TOKENS, SEED = 60, 7
ROUTERS = {
    "moe_max_over_mean": "load of the busiest expert over the mean",
    "moe_dead_experts": "experts without a token for 20 steps",
}
PLOT = ROOT / "docs/images/pretrain.svg"

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="where corpus and models go, and stay")
    parser.add_argument("--redraw", action="store_true", help="draw the newest record again")
    args = parser.parse_args()
    if args.redraw:
        records = (json.loads(path.read_text()) for path in RESULTS.glob("pretrain_*.json"))
        draw(max(records, key=lambda record: record["date"])["results"])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "moe/config.json").exists():
            make = [sys.executable, "examples/pretrain_corpus.py", str(folder)]
            subprocess.run(make, cwd=ROOT, check=True)
        train(folder, args.steps)
        results = {side: measured(folder, name) for side, name in SIDES.items()}
        data = {part: counts(folder / part) for part in ("train", "held-out")}
    report(results, args.steps, data)  # before the plot, which is a change of what is committed
    draw(results)


def words(folder: Path, name: str) -> list[str]:
    """Words for erniekit that mean one side's run with its files in `folder`."""

    def paths(part: str) -> str:
        return ",".join(str(folder / part / f"{language}.jsonl") for language in LANGUAGES)

    return [
        f"examples/configs/tiny/pt/run_pt_{name}.yaml",
        f"model_name_or_path={folder / name}",
        f"train_dataset_path={paths('train')}",
        f"eval_dataset_path={paths('held-out')}",
        f"output_dir={folder / f'out-{name}'}",
    ]  # fmt: skip


def train(folder: Path, steps: int) -> None:
    threads = max(len(os.sched_getaffinity(0)) // len(SIDES), 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    runs = []
    for name in SIDES.values():
        command = [sys.executable, "-m", "erniekit.cli", "train", *words(folder, name)]
        log = (folder / f"{name}.log").open("w")
        runs.append(
            subprocess.Popen(
                [*command, f"max_steps={steps}"], cwd=ROOT, env=environment,
                stdout=log, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    statuses = [run.wait() for run in runs]
    if any(statuses):
        raise SystemExit(f"a run ended with an error; see {folder}/moe.log and dense.log")


def counts(folder: Path) -> dict[str, dict[str, int]]:
    """Documents and bytes of their text, by language."""
    found = {}
    for language in LANGUAGES:
        with (folder / f"{language}.jsonl").open(encoding="utf-8") as lines:
            sizes = [len(json.loads(line)["text"].encode()) for line in lines]
        found[language] = {"documents": len(sizes), "bytes": sum(sizes)}
    return found


def measured(folder: Path, name: str) -> Record:
    """Curves, held-out bits per byte by language and samples of a trained side."""
    output = folder / f"out-{name}"
    steps, lines = steps_of(output)
    names = ("loss", *ROUTERS)
    return {
        "bits_per_byte": evaluated(words(folder, name), folder, output),
        "tokens": steps[-1]["total_tokens"],
        "seconds": sum(step["seconds"] for step in steps),
        "curves": {n: [round(s[n], 4) for s in steps] for n in names if n in steps[-1]},
        "held_out": [
            [line["step"], round(line["eval_bits_per_byte"], 4)]
            for line in lines
            if "eval_bits_per_byte" in line
        ],
        "samples": samples(output),
        **sizes(output),
    }


def evaluated(settings: Sequence[str], folder: Path, output: Path) -> dict[str, float]:
    """Bits per byte of all held-out text, by language, of the model in `output`."""
    bits = {}
    for language in LANGUAGES:
        only = [f"eval_dataset_path={folder / 'held-out' / f'{language}.jsonl'}"]
        only += ["eval_dataset_type=pretrain", "eval_dataset_prob=1.0", "max_evaluate_steps=-1"]
        command = [sys.executable, "-m", "erniekit.cli", "eval", *settings, *only]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        results = json.loads((output / "eval_results.json").read_text())
        bits[language] = results["eval_bits_per_byte"]
    return bits


def samples(folder: Path) -> dict[str, str]:
    import ernie
    from ernie.generate import generate

    model = ernie.load(folder)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        new = generate(
            model, ids, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.9, seed=SEED,
            stop_ids=tuple(tokenizer.eos_ids),
        )  # fmt: skip
        found[prompt] = tokenizer.decode([*ids, *new])
    return found


def sizes(folder: Path) -> Record:
    from ernie.config import ErnieConfig

    config = ErnieConfig.from_folder(folder)
    return {"parameters": config.num_params(), "active": config.num_params(active=True)}


def draw(results: dict[str, Record]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pretrain"  # the same numbers are the same file
    import matplotlib.pyplot as plt

    figure, (left, right, routers) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for side, record in results.items():
        left.plot(record["curves"]["loss"], label=f"{side}, training loss", linewidth=0.8)
        steps, bits = zip(*record["held_out"])
        right.plot(steps, bits, marker="o", markersize=3, label=f"{side}, held-out bits per byte")
        for name, told in ROUTERS.items():
            if name in record["curves"]:
                routers.plot(record["curves"][name], label=f"{side}, {told}", linewidth=0.8)
    left.set(xlabel="step", ylabel="nats per token", ylim=(3, None))
    right.set(xlabel="step", ylabel="bits per byte")
    routers.set(xlabel="step", ylabel="tokens over the mean; experts", ylim=(0, 6))
    for axes in (left, right, routers):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def report(results: dict[str, Record], steps: int, data: Record) -> None:
    more = {
        "busiest expert, last 50 steps, over the mean": _busiest,
        "experts without a token for 20 steps, at most and at the end": _dead,
        "hours on half the processors": lambda r: f"{r['seconds'] / 3600:.2f}",
    }
    table = table_of(results, "tokens", 3, more)
    moe, dense = (record["bits_per_byte"] for record in results.values())
    gains = [f"{language} {100 * (1 - moe[language] / dense[language]):+.1f} %" for language in moe]
    reading = f"Fewer bits a byte than the dense twin after the same tokens: {', '.join(gains)}."
    details = [["prompt", *results]]
    for prompt in PROMPTS:
        texts = (record["samples"][prompt] for record in results.values())
        details.append([prompt, *(" / ".join(text.split("\n")).replace("|", "") for text in texts)])
    write_record(
        "pretrain", QUESTION, f"python benchmarks/pretrain.py --steps {steps}",
        {"steps": steps, "configs": "examples/configs/tiny/pt", "temperature": 0.8, "top_p": 0.9,
         "corpus": "examples/pretrain_corpus.py", "data": data},
        results, table, reading, details,
    )  # fmt: skip


def table_of(
    results: Mapping[str, Record], tokens: str, digits: int, more: Mapping[str, Callable]
) -> list[list[str]]:
    """A column for each model: sizes, tokens, bits per byte to so many digits, `more` rows."""
    rows: dict[str, Callable[[Record], str]] = {
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f} M",
        "active for a token": lambda r: f"{r['active'] / 1e6:.1f} M",
        tokens: lambda r: f"{r['tokens'] / 1e6:.2f} M",
        **{
            f"held-out {name}, bits per byte": lambda r, n=name: (
                f"{r['bits_per_byte'][n]:.{digits}f}"
            )
            for name in LANGUAGES
        },
        **more,
    }
    cells = [[name, *map(cell, results.values())] for name, cell in rows.items()]
    return [["", *results], *cells]


def steps_of(output: Path) -> tuple[list[Record], list[Record]]:
    """What a run recorded of its steps, and all that it recorded."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], lines


def _busiest(record: Record) -> str:
    loads = record["curves"].get("moe_max_over_mean", [])[-50:]
    return f"{sum(loads) / len(loads):.2f}" if loads else ""


def _dead(record: Record) -> str:
    found = record["curves"].get("moe_dead_experts", [])
    return f"{max(found)}, {found[-1]}" if found else ""


if __name__ == "__main__":
    main()
