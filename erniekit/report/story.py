"""`report.html` of a run, made from what lies in its output folder.

    metrics.jsonl, run.yaml, about.json, answers.jsonl, eval_results.json  ->  Story  ->  page

Whatever is missing is left out, and lines that cannot be read are counted on the page: a run that
was killed while it wrote still has a report. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ernie.settings import ConfigError, read_yaml
from erniekit.checkpoint import replace_text
from erniekit.config import Run
from erniekit.metrics import METRICS_FILE
from erniekit.report import about
from erniekit.report.page import page

log = logging.getLogger("erniekit")

REPORT_FILE = "report.html"
SETTINGS_FILE = "run.yaml"
ANSWERS_FILE = "answers.jsonl"  # while training
RESULTS_FILE = "eval_results.json"
SAMPLES_FILE = "eval_samples.jsonl"  # of `erniekit eval`


@dataclass(frozen=True)
class Story:
    """What is known of a run. `steps` are the records of its steps, `held_out` those with an
    evaluation; both may be empty.
    """

    folder: Path
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    about: dict[str, Any]
    results: dict[str, Any]
    num_unreadable: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "learning_rate" in record]

    @property
    def num_steps(self) -> int:
        done = max((record["step"] for record in self.records), default=0)
        return max(self.about.get("num_steps", 0), done)

    @property
    def skipped(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("skipped")]

    @property
    def changed(self) -> dict[str, Any]:
        defaults = Run().flat()
        return {
            key: value
            for key, value in self.settings.items()
            if key not in defaults or value != defaults[key]
        }

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever a record has this number, and it is finite."""
        found = ((r["step"], r.get(key)) for r in self.records)
        return [(float(step), float(value)) for step, value in found if is_number(value)]

    @property
    def numbers(self) -> list[str]:
        """Every key that is a number in some record, in the order of appearance."""
        return list(dict.fromkeys(k for r in self.records for k, v in r.items() if is_number(v)))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read(folder: Path) -> Story:
    """The story of an output folder. Raises ConfigError for one that holds no records."""
    if not (folder / METRICS_FILE).is_file():
        raise ConfigError(
            f"{folder} has no {METRICS_FILE}; give the output_dir of a run of `erniekit train`"
        )
    records, bad_records = _lines(folder / METRICS_FILE)
    answers, bad_answers = _lines(folder / ANSWERS_FILE)
    settings = folder / SETTINGS_FILE
    return Story(
        folder,
        read_yaml(settings) if settings.is_file() else {},
        records,
        answers,
        about.read(folder),
        _object(folder / RESULTS_FILE),
        bad_records + bad_answers,
    )


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records with a step, and the number of lines that are none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [_parsed(line) for line in text.splitlines() if line.strip()]
    good = [line for line in lines if is_number(line.get("step"))]
    return good, len(lines) - len(good)


def _object(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write(folder: Path) -> Path:
    """Write `report.html`; a reader sees the old or the new one, whole."""
    path = folder / REPORT_FILE
    # A lone surrogate in an answer becomes a question mark.
    replace_text(path, page(read(folder)).encode("utf-8", "replace").decode())
    return path


def run_report(words: Sequence[str]) -> int:
    """`erniekit report OUTPUT_DIR`; returns the exit code."""
    if len(words) != 1:
        raise ConfigError(f"{len(words)} words were given; write: erniekit report OUTPUT_DIR")
    log.info("wrote %s", write(Path(words[0])))
    return 0
