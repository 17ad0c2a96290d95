"""What is left of a run that stopped over its skipped steps: `output_dir/debug-<step>/`.

    step.json       why, gradient norm by parameter (largest first), place in the data, random state
    batches.jsonl   each sequence of the step: its file and line, its tokens, the trained ones
    records.jsonl   the last 50 lines of metrics.jsonl
    run.yaml        every setting

Files only: weights and optimizer are in the last checkpoint, which the step has not changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from ernie.chat import UNTRAINED
from erniekit.checkpoint import replace_text
from erniekit.config import Run, to_yaml
from erniekit.data.batch import Batch
from erniekit.data.pack import Row
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.loop import SkippedStep
from erniekit.metrics import METRICS_FILE

_NUM_RECORDS = 50


def write_bundle(run: Run, stream: Stream, skipped: SkippedStep) -> Path:
    """Write the folder for the step that ended the run, and return it."""
    folder = run.output / f"debug-{skipped.step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    norms = sorted(skipped.norm_by_parameter.items(), key=lambda item: _order(item[1]))
    facts = {
        "step": skipped.step,
        "reason": skipped.reason,
        "data": skipped.start._asdict(),
        "norm_by_parameter": {n: v if math.isfinite(v) else str(v) for n, v in norms},
        "rng": torch.get_rng_state().tolist(),
    }
    replace_text(folder / "step.json", json.dumps(facts, indent=1) + "\n")
    num_rows = run.training.batch_size * len(skipped.window)
    sequences = _sequences(stream, skipped, num_rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in sequences]
    replace_text(folder / "batches.jsonl", "".join(lines))
    records = (run.output / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    replace_text(folder / "records.jsonl", "".join(records[-_NUM_RECORDS:]))
    replace_text(folder / "run.yaml", to_yaml(run))
    return folder


def _order(norm: float) -> tuple[bool, float]:
    return math.isfinite(norm), -norm if math.isfinite(norm) else 0.0


def _sequences(stream: Stream, skipped: SkippedStep, num_rows: int) -> Iterator[dict[str, Any]]:
    sequences = [row for n, batch in enumerate(skipped.window) for row in _cut(batch, n)]
    places = _origins(stream, skipped, num_rows)
    for row in sequences:
        found = places[tuple(row["token_ids"])]
        yield {"batch": row.pop("batch"), "file": found.pop(0) if found else None, **row}


def _cut(batch: Batch, number: int) -> Iterator[dict[str, Any]]:
    bounds = batch.cu_seqlens_S1.tolist()
    for start, end in pairwise(bounds):
        if start < batch.num_tokens:  # the rest is padding
            labels_T = batch.labels_T[start:end]
            yield {
                "batch": number,
                "token_ids": batch.token_ids_T[start:end].tolist(),
                "trained": [i for i, label in enumerate(labels_T.tolist()) if label != UNTRAINED],
            }


def _origins(
    stream: Stream, skipped: SkippedStep, num_rows: int
) -> dict[tuple[int, ...], list[str]]:
    """`file:line` of the samples of the step, by their tokens: its rows are read again."""
    rows = islice(_readable(stream.drawn_rows(skipped.start)), num_rows)
    drawn = [drawn for row, _ in rows for drawn in row]
    first, last = skipped.start.position, max((d.position for d in drawn), default=0)
    draws = list(islice(stream.mix.draws(first), last + 1 - first))
    places: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for one in drawn:
        source, index = draws[one.position - first]
        places[tuple(one.sample.token_ids)].append(stream.sources[source].where(index))
    return places


def _readable(rows: Iterator[Row]) -> Iterator[Row]:
    """Up to where too many records are bad: that is not what the run stopped over."""
    with contextlib.suppress(DataError):
        yield from rows
