"""`report.html`: its plots say what the records say, and nothing that a run brings in gets out."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import re
import termios
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import ernie
from ernie.generate import generate
from ernie.settings import ConfigError
from erniekit.cli import main
from erniekit.config import run_from, to_yaml
from erniekit.metrics import line
from erniekit.report import heat, plots, story
from erniekit.report.bar import Bar, duration
from erniekit.report.plots import Line, plot, smoothed, thinned
from erniekit.report.scores import scores

HOSTILE = '</p><script>alert(1)</script><img src="x" onerror=alert(2)>&amp;\x00\u202e"\'\ud800'


def curves(svg: str) -> dict[str, list[tuple[float, float]]]:
    """The points of every line of a plot, turned back into numbers."""
    (x0, x1), (y0, y1) = (
        map(float, re.search(f'data-{axis}="(\\S+) (\\S+)"', svg).groups()) for axis in "xy"
    )
    found = {}
    for name, points in re.findall(r'data-name="([^"]+)" points="([^"]*)"', svg):
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        found[name] = [
            (
                x0 + (u - plots._LEFT) / (plots._RIGHT - plots._LEFT) * (x1 - x0),
                y0 + (plots._BOTTOM - v) / (plots._BOTTOM - plots._TOP) * (y1 - y0),
            )
            for u, v in pairs
        ]
    return found


def write_run(folder: Path, records: list[dict], answers: list[dict] = (), **settings) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(to_yaml(run_from(settings)))
    for name, rows in (("metrics.jsonl", records), ("answers.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number: int, **more) -> dict:
    return {
        "step": number,
        "loss": 3 / number,
        "learning_rate": 1e-4 / number,
        "grad_norm": 1.5,
        "tokens_per_second": 900.0 + number,
        "num_tokens": 90,
        "num_trained_tokens": 40,
        "total_tokens": 90 * number,
        "seconds": 0.1,
        "peak_memory_gib": 1.25,
    } | more


def page_of(folder: Path) -> str:
    return story.write(folder).read_text(encoding="utf-8")


def test_points_of_a_plot_are_the_numbers_of_the_records(tmp_path: Path) -> None:
    records = [step(i, moe_max_over_mean=1 + 1 / i) for i in range(1, 31)]
    records[9] |= {"eval_loss": 1.75, "rewards/margin": -0.5}
    records[19] |= {"eval_loss": 1.25, "rewards/margin": 0.5}
    found = curves(page_of(write_run(tmp_path, records)))
    for key in ("loss", "eval_loss"):  # of one plot
        wanted = [(r["step"], r[key]) for r in records if key in r]
        for (x, y), (u, v) in zip(wanted, found[key], strict=True):
            assert abs(x - u) < 0.01 and abs(y - v) < 1e-3, f"{key}: {(x, y)} is drawn at {(u, v)}"
    text = page_of(tmp_path)
    for svg in re.findall("<svg.*?</svg>", text):
        for key, points in curves(svg).items():
            wanted = [(r["step"], r[key]) for r in records if key in r]
            size = max(abs(y) for _, y in wanted)
            for (x, y), (u, v) in zip(wanted, points, strict=True):
                assert abs(x - u) < 0.01 and abs(y - v) < 1e-3 * size, f"{key} at {x}: {v}"
    assert "rewards/margin" in text, "a number that no row of PLOTS names has no plot"


@pytest.mark.parametrize("y", [0.0, -3.0, 1e-7, 5e9, 2.5])
def test_a_single_number_is_a_plot_too(y: float) -> None:
    ((u, v),) = curves(plot([Line("a", [(7, y)], "c0")]))["a"]
    assert abs(u - 7) < 0.05 and v == pytest.approx(y, rel=1e-3, abs=1e-3)


def test_thinning_keeps_every_spike_and_smoothing_keeps_a_constant() -> None:
    points = [(float(i), 1.0 + (i == 777) - (i == 3333)) for i in range(5000)]
    kept = thinned(points, 400)
    assert len(kept) <= 400 and points[777] in kept and points[3333] in kept
    assert kept == sorted(kept)
    line = [(float(i), 2.0 * i) for i in range(101)]
    for x, y in smoothed(line, 3)[30:71]:
        assert y == pytest.approx(2 * x, rel=1e-3), f"the curve lags at {x}"
    assert all(y == pytest.approx(4) for _, y in smoothed([(i, 4.0) for i in range(50)], 9))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data) -> None:
        self.texts.append(data)


def test_hostile_words_stay_words_and_nothing_is_loaded(tmp_path: Path) -> None:
    answer = {
        "step": 0,
        "where": HOSTILE,
        "messages": [{"role": "user", "content": HOSTILE}],
        "reference": HOSTILE,
        "answer": HOSTILE,
        "f1": 0.5,
    }
    folder = write_run(
        tmp_path, [step(1, **{HOSTILE: 1.0})], [answer, answer | {"step": 1}],
        model_name_or_path=HOSTILE.replace("\ud800", "").replace("\0", ""),
    )  # fmt: skip
    start = {"time": HOSTILE, "step": 0, "command": HOSTILE, "machine": {HOSTILE: HOSTILE}}
    (folder / "about.json").write_text(json.dumps({"num_steps": 1, "starts": [start]}))
    (folder / "eval_results.json").write_text(json.dumps({"model": HOSTILE, HOSTILE: 1.0}))
    text = page_of(folder)
    tags = Tags()
    tags.feed(text)
    assert not {"script", "img", "link", "iframe", "a"} & set(tags.tags), set(tags.tags)
    assert not {"src", "href", "onerror"} & set(tags.attributes)
    assert "http" not in text.replace("http-equiv", "")
    assert "\x00" not in text and "\u202e" not in text
    assert sum("<script>alert(1)</script>" in t for t in tags.texts) >= 6


def test_half_written_records_make_a_page_that_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [{"step": 0, "eval_loss": 4.0}, step(1), step(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0, "learn')
    (folder / "about.json").write_text('{"num_steps": 9')
    (folder / "answers.jsonl").write_bytes(b'\xff\xfe\n{"answer": "of no step"}\n')
    text = page_of(folder)
    assert "2 of 2 steps" in text
    assert "Lines that cannot be read: 3." in text
    (folder / "metrics.jsonl").write_text("")
    assert "0 of 0 steps" in page_of(folder)


def test_the_style_knows_how_many_numbers_stand_at_the_top(tmp_path: Path) -> None:
    """Rows of them are equally full: no card is left over on a line of its own."""
    for more, count in (({}, 5), ({"eval_loss": 2.0, "eval_ppl": 7.4}, 7)):
        page = page_of(write_run(tmp_path / str(count), [step(1, **more)]))
        _, style, cards = re.split(r'<section class="cards" style="([^"]*)">', page)
        assert cards.split("</section>")[0].count("<div>") == count
        assert style == f"--all:{count};--half:{-(-count // 2)}"


def test_skipped_steps_are_marked_and_listed(tmp_path: Path) -> None:
    bad = step(3, loss=None, grad_norm=None, skipped=True)
    text = page_of(write_run(tmp_path, [step(1), step(2), bad, step(4)]))
    assert text.count("step 3: skipped") == 2, "in the plots of loss and gradient norm"
    assert "<td>not finite</td>" in text
    assert [x for x, _ in curves(text)["loss"]] == pytest.approx([1, 2, 4], abs=0.01)


def test_changed_settings_come_first(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, [step(1)], lora_rank=3, learning_rate=2e-3))
    changed, _, rest = text.partition("at their defaults")
    assert "<td>lora_rank</td><td>3</td>" in changed and "<td>0.002</td>" in changed
    assert "<td>lora_alpha</td>" in rest and "<td>lora_rank</td>" not in rest


def test_report_of_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="erniekit report OUTPUT_DIR"):
        story.run_report([])


# --- a run ---


def words(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    values = {
        "model_name_or_path": model,
        "train_dataset_path": data / "train.jsonl",
        "eval_dataset_path": data / "eval.jsonl",
        "output_dir": output,
        "max_seq_len": 96,
        "max_steps": 6,
        "save_steps": 3,
        "evaluation_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_answer_tokens": 12,
    } | more
    return [f"{key}={value}" for key, value in values.items()]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_a_report_that_can_be_made_again(tiny, data: Path, tmp_path: Path) -> None:
    arguments = words(tiny("tiny-moe"), data, tmp_path, fine_tuning="Full", report_to="none")
    assert main(["train", *arguments]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "6 of 6 steps" in text and ">finished<" in text
    assert "Router: busiest expert" in text and "before training" in text
    records = lines(tmp_path / "metrics.jsonl")
    drawn = curves(re.search("<svg.*?</svg>", text)[0])
    for (x, y), record in zip(drawn["loss"], records[1:], strict=True):
        assert x == pytest.approx(record["step"], abs=0.02)
        assert y == pytest.approx(record["loss"], rel=1e-3)
    about = json.loads((tmp_path / "about.json").read_text())
    (start,) = about["starts"]
    assert start["command"] == "erniekit train " + " ".join(arguments)
    assert about["data"]["train"]["files"][0]["records"] == 40

    (tmp_path / "report.html").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == text


def test_answers_change_no_number_and_are_those_of_generate(
    tiny, data: Path, tmp_path: Path
) -> None:
    folder = tiny("tiny-dense")
    quiet, told = tmp_path / "quiet", tmp_path / "told"
    assert main(["train", *words(folder, data, quiet, num_answers=0)]) == 0
    assert main(["train", *words(folder, data, told, num_answers=4, answer_steps=2)]) == 0
    keys = ("step", "loss", "grad_norm", "accuracy", "eval_loss")
    numbers = [[tuple(r.get(k) for k in keys) for r in lines(o / "metrics.jsonl")]
               for o in (quiet, told)]  # fmt: skip
    assert numbers[0] == numbers[1]
    assert not lines(quiet / "answers.jsonl")

    answers = lines(told / "answers.jsonl")
    assert [a["step"] for a in answers] == [s for s in (0, 2, 4, 6) for _ in range(4)]
    assert [a["where"] for a in answers[:4]] == [f"{data}/eval.jsonl:{i}" for i in (1, 3, 5, 7)]
    first = answers[1]
    assert first["reference"] == "It is one and one and 2."
    model = ernie.load(folder)
    template = ernie.chat.ChatTemplate.for_folder(folder, model.tokenizer)
    encoded = template.encode(model.tokenizer, first["messages"])
    ids = list(generate(model, encoded.token_ids, max_tokens=first["num_tokens"]))
    wanted = model.tokenizer.decode(
        [i for i in ids if i not in ernie.chat.stop_ids(model.tokenizer)]
    )
    assert first["answer"] == wanted.strip()


def test_answers_of_a_resumed_run_are_those_of_an_unbroken_one(
    tiny, data: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = {"answer_steps": 2, "num_answers": 2}
    assert main(["train", *words(tiny("tiny-dense"), data, whole, **arguments)]) == 0
    # The first start gets to step 5, and is resumed from the checkpoint of step 3.
    first = words(tiny("tiny-dense"), data, parts, max_steps=5, **arguments)
    assert main(["train", *first]) == 0
    (parts / "checkpoint-5/complete.json").unlink()
    assert main(["train", *words(tiny("tiny-dense"), data, parts, **arguments)]) == 0
    assert lines(parts / "answers.jsonl") == lines(whole / "answers.jsonl")
    assert [s["step"] for s in json.loads((parts / "about.json").read_text())["starts"]] == [0, 3]


def test_evaluation_writes_answers_with_scores(tiny, data: Path, tmp_path: Path) -> None:
    arguments = words(tiny("tiny-dense"), data, tmp_path, num_answers=-1)
    write_run(tmp_path, [step(1)])
    assert main(["eval", *arguments]) == 0
    given = lines(tmp_path / "eval_samples.jsonl")
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert len(given) == results["answers"]["num_answers"] == 8
    for name in ("exact", "contains", "f1"):
        mean = sum(scores(a["answer"], a["reference"])[name] for a in given) / 8
        assert results["answers"][name] == pytest.approx(mean)
    assert "<td>eval loss</td>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "contains", "f1"),
    [
        ("It is 4.", "it is  4", 1, 1, 1),
        ("I think it is 4, or so", "it is 4", 0, 1, 2 * 3 / (7 + 3)),
        ("forty", "4", 0, 0, 0),
        ("14", "4", 0, 0, 0),
        ("北京市", "北京", 0, 1, 2 * 2 / (3 + 2)),
        ("", "4", 0, 0, 0),
        ("4 4", "4", 0, 1, 2 / 3),
    ],
)
def test_scores_of_answers(answer, reference, exact, contains, f1) -> None:
    assert scores(answer, reference) == {"exact": exact, "contains": contains, "f1": f1}


def test_accuracy_of_a_step_is_the_share_of_likeliest_tokens(
    tiny, data: Path, tmp_path: Path
) -> None:
    arguments = words(
        tiny("tiny-dense"), data, tmp_path, learning_rate=0, max_steps=1, packing="false",
        gradient_accumulation_steps=8, train_dataset_path=data / "eval.jsonl", buffer_size=8,
        random_shuffle="false", mix_strategy="concat", fine_tuning="Full",
    )  # fmt: skip
    assert main(["train", *arguments]) == 0
    before, after = lines(tmp_path / "metrics.jsonl")
    assert before["eval_tokens"] == after["num_trained_tokens"]
    assert after["accuracy"] == before["eval_accuracy"], "of the same samples and weights"
    assert after["loss"] == pytest.approx(before["eval_loss"], rel=1e-5)


# --- the bar ---


def test_bar_tells_the_time_that_is_left_and_makes_room_for_lines(monkeypatch) -> None:
    out, log = io.StringIO(), logging.getLogger("erniekit")
    handler = logging.StreamHandler(out)
    monkeypatch.setattr(log, "handlers", [handler])
    clock = iter([103.0, 130.0])
    monkeypatch.setattr("erniekit.report.bar.time.monotonic", lambda: next(clock))
    bar = Bar(10, 40, out)
    bar.update(step(11, loss=2.5, seconds=3.0))
    assert out.getvalue().endswith("| 1:27 left")
    bar.update(step(20, loss=2.5, seconds=3.0))
    assert out.getvalue().endswith(
        "[##########----------] 20/40 | loss 2.5000 | 3,000 ms | 1:00 left"
    )
    log.warning("saved")
    assert out.getvalue().endswith("left\r\x1b[Ksaved\n")
    bar.close()
    assert not handler.filters
    assert duration(3723.4) == "1:02:03"


MOE = {"moe_max_over_mean": 1.34, "moe_entropy": 0.87, "moe_dead_experts": 2}
VISION = {
    "moe_vision_max_over_mean": 2.1, "moe_vision_entropy": 0.55, "moe_vision_dead_experts": 0,
}  # fmt: skip
PAIRS = {"rewards_accuracy": 0.75, "rewards_margin": -0.1234}
ROLLOUTS = {"reward": 0.5312, "right": 0.25, "kl": 0.01, "entropy": 1.5, "length": 321.0}


def drawn(columns: int, record: dict, num_steps: int = 1000) -> str:
    """What a bar writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with open(theirs, "w") as out, open(ours, "rb") as screen:
        Bar(record["step"] - 1, num_steps, out).update(record)
        return os.read(screen.fileno(), 4096).decode().removeprefix("\r\x1b[K")


@pytest.mark.parametrize(
    ("more", "narrow", "wide"),
    [
        ({}, "loss 2.1034 | 812 ms", "loss 2.1034 | 812 ms"),
        (
            MOE,
            "loss 2.1034 | 812 ms | moe max/mean 1.34 dead 2",
            "loss 2.1034 | 812 ms | moe max/mean 1.34 dead 2",
        ),
        (
            MOE | VISION,
            "loss 2.1034 | moe max/mean 1.34 dead 2 | vision 2.10",
            "loss 2.1034 | 812 ms | moe max/mean 1.34 dead 2 | vision 2.10",
        ),
        (
            MOE | VISION | {"moe_dead_experts": 0, "moe_vision_dead_experts": 3},
            "loss 2.1034 | moe max/mean 1.34 | vision 2.10 dead 3",
            "loss 2.1034 | 812 ms | moe max/mean 1.34 | vision 2.10 dead 3",
        ),
        (
            MOE | PAIRS,
            "loss 2.1034 | right 75 % | moe max/mean 1.34 dead 2",
            "loss 2.1034 | margin -0.1234 | right 75 % | 812 ms | moe max/mean 1.34 dead 2",
        ),
        (
            MOE | ROLLOUTS,
            "loss 2.1034 | reward 0.5312 | moe max/mean 1.34 dead 2",
            "loss 2.1034 | reward 0.5312 | right 25 % | 812 ms | moe max/mean 1.34 dead 2",
        ),
        (
            {"skipped": True, "skipped_because": "of a spike"},
            "loss 2.1034 | 812 ms | SKIPPED",
            "loss 2.1034 | 812 ms | SKIPPED",
        ),
    ],
)
def test_bar_has_the_parts_of_the_line_that_there_is_room_for(more, narrow, wide) -> None:
    record = step(400, loss=2.1034, seconds=0.812, **more)
    for columns, wanted in ((80, narrow), (120, wide)):
        text = drawn(columns, record)
        assert text.partition("400/1000 | ")[2] == f"{wanted} | 8:07 left", f"{columns} columns"
    told = re.sub(" entropy 0...|(?<=vision) max/mean", "", line(record, 1000))
    assert all(part in told for part in wide.split(" | ")), "what the bar says, the line does too"


def test_bar_never_wraps_and_drops_the_least_first() -> None:
    record = step(123456, loss=2.1034, seconds=1234.5, skipped=True, **MOE, **VISION, **PAIRS)
    order, seen = [], set()
    for columns in (*range(1, 200), 1000):
        text = drawn(columns, record, 1_000_000)
        assert len(text) < columns, f"{len(text)} in {columns} columns"
        parts = {re.sub(r"^[\d,:]+ | .*", "", part) for part in text.split(" | ")[1:]}
        assert seen <= parts, f"{columns} columns lack {seen - parts}, which fewer have"
        order += sorted(parts - seen)
        seen = parts
    assert order == ["loss", "left", "SKIPPED", "moe", "right", "margin", "vision", "ms"]
    assert len(re.search(r"\[(.*)\]", text)[1]) == 20
    text = drawn(0, step(400, loss=2.1034))
    assert text.startswith("[####"), "one that tells no size has 80"


def test_the_line_has_both_banks_of_experts_as_the_page_of_pictures_says() -> None:
    told = line(step(1, **MOE, **VISION), 10).split(" | ")[-2:]
    page = (Path(__file__).parents[2] / "docs/methods/vl.md").read_text("utf-8")
    assert f"`{' | '.join(told)}`" in page
    assert line(step(1, **MOE), 10).endswith("GiB | moe max/mean 1.34 entropy 0.87 dead 2")


def test_the_page_has_heat_maps_of_both_banks(tmp_path: Path) -> None:
    """What is drawn of the vision experts is theirs; a step of text alone has no column there."""
    text_loads, vision_loads = [[3, 1], [2, 2]], [[4, 0, 0, 0], [1, 1, 1, 1]]
    both = {"moe_loads": text_loads, "moe_vision_loads": vision_loads}
    records = [
        step(1, **both),
        step(2, **both | {"moe_vision_loads": [[0] * 4] * 2}),
        step(3, **both),
    ]
    page = page_of(write_run(tmp_path / "both", records))
    _, text, vision = re.split("<h2>(?:Text|Vision) experts</h2>", page)
    vision = vision.partition("</section>")[0]

    def levels(loads: list[int], columns: int) -> str:
        mean = sum(loads) / len(loads)
        return " ".join(str(heat.level(n / mean)) * columns for n in loads)

    maps = re.findall('data-levels="([^"]*)"', text)
    assert maps[1:] == [levels(loads, 3) for loads in text_loads]
    maps = re.findall('data-levels="([^"]*)"', vision)
    assert maps[0] == "77 44", "the busiest of each layer"
    assert maps[1:] == [levels(loads, 2) for loads in vision_loads]
    assert "<h3>Layer of vision experts 0</h3>" in vision

    records = [step(1, moe_loads=text_loads)]
    page = page_of(write_run(tmp_path / "text", records))
    assert "<h2>Experts</h2>" in page and "ision experts" not in page


def test_loss_without_a_number_is_not_drawn_as_one(tmp_path: Path) -> None:
    records = [step(1), step(2, loss=math.nan)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert len(curves(page_of(tmp_path))["loss"]) == 1
    assert torch.is_grad_enabled(), "answers and evaluation leave gradients on"


@pytest.mark.parametrize(
    ("low", "high"), [(1.1012, 1.1021), (0, 3), (12_000, 12_004), (1e-4, 3e-3)]
)
def test_labels_of_an_axis_differ(low: float, high: float) -> None:
    svg = plots.plot([plots.Line("a", [(0, low), (1, high)], "c0")])
    labels = re.findall(r'class="y">([^<]*)<', svg)
    assert len(labels) > 1 and len(set(labels)) == len(labels)
