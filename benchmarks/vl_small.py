"""Does a small multimodal model trained from nothing see what is in a picture that it never saw?

    python benchmarks/vl_small.py --folder FOLDER [--steps 4000] [--text-steps 900]

`examples/vl_small.py` draws the pictures; the model is trained on those of single things and short
texts and then on all, and its twin on the same questions and answers without the pictures, until it
is flat: what the twin knows is how often each answer is right. Runs that lie in FOLDER already are
taken as they are. Both answer the questions of every held-out set greedily, and an answer is right
if it is the expected one, letter by letter.

The record shows the shares by set; `docs/images/vl_small.png` the first English question of each
set and of some the second, as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, write_record
from PIL import Image, ImageDraw, ImageFont
from pretrain import sizes, steps_of

QUESTION = __doc__.splitlines()[0]
CONFIG = "examples/configs/tiny/vl/run_vl_sft.yaml"
FIRST = ("max_seq_len=512", "max_steps=1500", "learning_rate=6e-4", "min_lr=4e-4")
SIDES = {"with pictures": "", "text alone": "-text"}
# A file of each set, and what it holds.
SETS = {
    "colour": "colour, one of 8",
    "shape": "shape, one of 8",
    "count": "count, all or of one colour, 1 to 9",
    "caption-seen-pairs": "caption of two shapes",
    "caption": "caption, colour and shape never seen together",
    "number": "1 to 3 digits, strings never seen",
    "word": "2 or 3 capitals, strings never seen",
    "chart": "bar chart: highest, lowest, how many, how high",
    "emoji": "emoji, one of 96, placed anew",
}
TWICE = ("caption", "word", "chart")  # sets of which the sheet shows two
SHEET = ROOT / "docs/images/vl_small.png"

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--folder", type=Path, required=True, help="where pictures and runs go")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--text-steps", type=int, default=900)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if not (args.folder / "model/config.json").exists():
        make = [sys.executable, "examples/vl_small.py", str(args.folder)]
        subprocess.run(make, cwd=ROOT, check=True)
    results = {}
    for side, name in SIDES.items():
        steps = args.text_steps if name else args.steps
        results[side] = measured(args.folder, name, steps)
        print(side, results[side]["right"], file=sys.stderr, flush=True)
    draw(args.folder, results)
    report(results, args.steps, args.text_steps)


def measured(folder: Path, name: str, steps: int) -> Record:
    """Curves of a side's run, its answers to every set, and the shares that are right."""
    output = folder / f"out{name}"
    if not (output / "model.safetensors").exists():
        train(folder, name, steps)
    done, lines = steps_of(output)
    first = [] if name else steps_of(folder / "out-first")[0]
    answers = answered(folder, name, output)
    return {
        "right": {kind: share(given) for kind, given in answers.items()},
        "by_language": {
            language: {
                kind: share([a for a in given if is_chinese(a) == (language == "chinese")])
                for kind, given in answers.items()
            }
            for language in ("english", "chinese")
        },
        "asked": sum(map(len, answers.values())),
        "answers": {kind: given[:20] for kind, given in answers.items()},
        "steps": len(first) + len(done),
        "tokens": sum(step["num_tokens"] for step in (*first, *done)),
        "seconds": round(sum(step["seconds"] for step in (*first, *done))),
        "loss": [[s["step"], round(s["loss"], 4)] for s in done if s["step"] % 50 == 0],
        "held_out": [[s["step"], round(s["eval_loss"], 4)] for s in lines if "eval_loss" in s],
        **sizes(output),
    }


def train(folder: Path, name: str, steps: int) -> None:
    start = folder / "model"
    if not name:
        if not (folder / "out-first/model.safetensors").exists():
            erniekit(folder, start, "first", "out-first", *FIRST)
        start = folder / "out-first"
    evaluation = f"eval_dataset_path={folder / f'eval{name}.jsonl'}"
    erniekit(folder, start, f"train{name}", f"out{name}", evaluation, f"max_steps={steps}")


def erniekit(folder: Path, start: Path, data: str, output: str, *more: str) -> None:
    """A run of the example's file on other data, from another start."""
    settings = [
        CONFIG, f"model_name_or_path={start}", f"train_dataset_path={folder / data}.jsonl",
        f"eval_dataset_path={folder / 'eval.jsonl'}", f"output_dir={folder / output}", *more,
    ]  # fmt: skip
    command = [sys.executable, "-m", "erniekit.cli", "train", *settings]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with (folder / f"{output}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=log)


def answered(folder: Path, name: str, model: Path) -> dict[str, list[Record]]:
    """Of each set a list of {"question", "answer", "given", "picture"}."""
    from fastdeploy import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=256, max_num_seqs=32)
    params = SamplingParams(max_tokens=24, temperature=0)
    found = {}
    for kind in SETS:
        path = folder / "held-out" / f"{kind}.jsonl"
        items = [item_of(json.loads(line), path) for line in path.read_text("utf-8").splitlines()]
        outputs = llm.chat([messages_of(i, not name) for i in items], params, use_tqdm=False)
        found[kind] = [i | {"given": o.outputs.text.strip()} for i, o in zip(items, outputs)]
        print(name, kind, share(found[kind]), file=sys.stderr, flush=True)
    return found


def item_of(record: Record, path: Path) -> Record:
    question, answer = (entry["text"] for entry in record["text_info"])
    picture = (path.parent / record["image_info"][0]["image_url"]).resolve()
    place = str(picture.relative_to(path.parents[1].resolve()))
    return {"question": question, "answer": answer, "picture": place, "folder": path.parents[1]}


def messages_of(item: Record, is_pictured: bool) -> list[Record]:
    picture = item.pop("folder") / item["picture"]
    if not is_pictured:
        return [{"role": "user", "content": item["question"]}]
    with Image.open(picture) as image:
        part = {"type": "image", "image": image.copy()}
    text = {"type": "text", "text": item["question"]}
    return [{"role": "user", "content": [part, text]}]


def share(given: list[Record]) -> float:
    """Percent of answers that are the expected one."""
    return round(100 * sum(a["given"] == a["answer"] for a in given) / max(len(given), 1), 1)


def is_chinese(answer: Record) -> bool:
    return not answer["question"].isascii()


def draw(folder: Path, results: dict[str, Record]) -> None:
    """The first English questions of the sets, four in a row: picture, answers, what is right."""
    seeing, blind = (results[side]["answers"] for side in SIDES)
    shown = []
    for kind in SETS:
        chosen = [i for i, a in enumerate(seeing[kind]) if not is_chinese(a)]
        shown += [(seeing[kind][i], blind[kind][i]) for i in chosen[: 1 + (kind in TWICE)]]
    wide, high, across = 290, 262, 4
    sheet = Image.new("RGB", (wide * across, high * -(-len(shown) // across)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (answer, guess) in enumerate(shown):
        x, y = i % across * wide + 10, i // across * high + 10
        with Image.open(folder / answer["picture"]) as image:
            sheet.paste(image.resize((168, 168), Image.Resampling.BICUBIC), (x, y))
        is_right = answer["given"] == answer["answer"]
        for line, text, colour in (
            (0, answer["question"], "#000000"),
            (1, answer["given"], "#1a7f37" if is_right else "#c62828"),
            (2, "" if is_right else f"right: {answer['answer']}", "#000000"),
            (3, f"without the picture: {guess['given']}", "#777777"),
        ):
            canvas.text((x, y + 172 + 18 * line), text[:44], fill=colour, font=font)
    SHEET.parent.mkdir(exist_ok=True)
    sheet.quantize(128).save(SHEET, optimize=True)


def report(results: dict[str, Record], steps: int, text_steps: int) -> None:
    seeing, blind = results.values()
    table = [["held-out set, right answers", *results]]
    table += [
        [words, *(f"{r['right'][kind]:.1f} %" for r in results.values())]
        for kind, words in SETS.items()
    ]
    english, chinese = (seeing["by_language"][name] for name in ("english", "chinese"))
    details = [["with pictures", "asked in English", "asked in Chinese"]]
    details += [[words, f"{english[k]:.1f} %", f"{chinese[k]:.1f} %"] for k, words in SETS.items()]
    details += [
        [f"{what}: pictures / text", *(f"{r[key] / unit:.{digits}f}" for r in (seeing, blind))]
        for what, key, unit, digits in (
            ("steps", "steps", 1, 0),
            ("million tokens", "tokens", 1e6, 2),
            ("hours on one shared core", "seconds", 3600, 2),
        )
    ]
    least = min(SETS, key=lambda kind: seeing["right"][kind] - blind["right"][kind])
    reading = (
        f"{seeing['parameters'] / 1e6:.1f} M parameters, {seeing['active'] / 1e6:.1f} M active for "
        f"a token of text, {seeing['asked'] // len(SETS)} pictures a set. "
        f"Smallest lead over the twin without pictures: {SETS[least]}, "
        f"{seeing['right'][least]:.1f} against {blind['right'][least]:.1f} %."
    )
    write_record(
        "vl_small", QUESTION,
        f"python benchmarks/vl_small.py --folder FOLDER --steps {steps} --text-steps {text_steps}",
        {"config": CONFIG, "temperature": 0, "match": "exact"},
        results, table, reading, details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
