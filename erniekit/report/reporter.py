"""Everything a training run tells while it goes on, and all the places it goes to.

each step        a log line or the bar; metrics.jsonl; the sinks of `report_to`
now and then     answers to evaluation prompts: answers.jsonl
each checkpoint, at the end        about.json, report.html
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from ernie.model import ErnieModel
from erniekit import checkpoint, metrics
from erniekit.config import Run
from erniekit.data.stream import Stream
from erniekit.metrics import Metrics
from erniekit.report import about, sinks, story
from erniekit.report.answers import answers, prompts
from erniekit.report.bar import Bar
from erniekit.report.scores import CALL_SCORES, mean_scores

log = logging.getLogger("erniekit")


class Reporter:
    """Made once a start, after `step` steps of `num_steps`; `step` -1 starts the records anew.

    A silent one, of all ranks but the first, only has the model answer along. Raises ConfigError
    where a package of `report_to` is missing.
    """

    def __init__(
        self,
        run: Run,
        model: ErnieModel,
        train_stream: Stream,
        eval_stream: Stream | None,
        *,
        step: int,
        num_steps: int,
        is_silent: bool = False,
    ) -> None:
        self.run, self.model, self.num_steps = run, model, num_steps
        self.streams = {"train": train_stream, "eval": eval_stream}
        self.is_silent = is_silent
        is_wanted = run.reporting.answer_steps or run.training.evaluation_strategy != "no"
        has_prompts = eval_stream is not None and run.stage.has_answers and is_wanted
        self.num_asked = run.reporting.num_answers if has_prompts else 0
        if not is_silent:
            self._open(step)

    def _open(self, step: int) -> None:
        run, num_steps = self.run, self.num_steps
        self.sinks = sinks.open_sinks(run, max(step, 0))
        starts = about.read(run.output).get("starts", []) if step >= 0 else []
        self.starts = [*starts, about.start(max(step, 0), "train", run.words)]
        self._write_about()  # before the first record: by it the folder is known as that of a run
        self.metrics = Metrics(run.output)
        self.answers = Metrics(run.output, story.ANSWERS_FILE)
        for records in (self.metrics, self.answers):
            records.rewind(step)
        has_bar = sys.stderr.isatty() and not run.reporting.disable_tqdm
        self.bar = Bar(max(step, 0), num_steps) if has_bar and step < num_steps else None
        self.has_lines = not (self.bar and sys.stdout.isatty())

    def tell(self, record: dict[str, Any]) -> None:
        """Show a step: a line every `logging_steps`, the bar at every one."""
        if self.is_silent:
            return
        step = record["step"]
        is_due = step % self.run.training.logging_steps == 0 or step == self.num_steps
        if is_due and self.has_lines:
            log.info("%s", metrics.line(record, self.num_steps))
        if self.bar is not None:
            self.bar.update(record)

    def write(self, record: dict[str, Any]) -> None:
        """Record a step, with what was evaluated after it, and answer prompts where it is due."""
        if not self.is_silent:
            self.metrics.write(record)
            numbers = sinks.numbers_of(record)
            for sink in self.sinks:
                sink.write(record["step"], numbers)
        step, every = record["step"], self.run.reporting.answer_steps
        if step and (step == self.num_steps or (every and step % every == 0)):
            self.answer(step)

    def write_page(self) -> None:
        """Bring about.json and report.html up to date."""
        self._write_about()
        story.write(self.run.output)

    def close(self) -> None:
        """Take the bar away, close the sinks and write the last page."""
        if self.is_silent:
            return
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()
        self.write_page()

    def answer(self, step: int) -> None:
        """Answer prompts, always the same ones, with the model as it is after `step` steps."""
        eval_stream = self.streams["eval"]
        if eval_stream is None or not self.num_asked:
            return
        asked = prompts(eval_stream, self.num_asked)
        records = answers(self.model, asked, self.run.reporting.max_answer_tokens, step)
        if self.is_silent or not records:
            return
        for record in records:
            self.answers.write(record)
        means = mean_scores(records)
        told = " | ".join(f"{k} {means[k]:.3f}" for k in ("f1", *CALL_SCORES) if k in means)
        log.info("answers at step %d | %d prompts | %s", step, len(records), told)

    def _write_about(self) -> None:
        parameters = list(self.model.parameters())
        facts = {
            "num_steps": self.num_steps,
            "model": {
                "parameters": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": {split: _data(s) for split, s in self.streams.items() if s is not None},
            "starts": self.starts,
        }
        path = self.run.output / about.ABOUT_FILE
        checkpoint.replace_text(path, json.dumps(facts, indent=1) + "\n")


def _data(stream: Stream) -> dict[str, Any]:
    files = zip(stream.sources, stream.kinds)
    return {
        "files": [
            {"path": str(Path(source.path)), "format": kind, "records": len(source)}
            for source, kind in files
        ],
        "records_of_an_epoch": stream.epoch_size,
        "left_out": dict(stream.faults.by_reason),
        "cut": {k: stream.encoder.counts[k] for k in ("dialogues cut", "turns dropped")},
    }
