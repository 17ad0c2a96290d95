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
from erniekit.data.loader import Batch, Stream
from erniekit.data.pack import Drawn
from erniekit.data.sources import DataError
from erniekit.loop import SkippedStep
from erniekit.metrics import METRICS_FILE

_NUM_RECORDS = 50
_MOST_BUFFERS = 4  # of greedy packing that are read to find where a sequence came from


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
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _sequences(stream, skipped)]
    replace_text(folder / "batches.jsonl", "".join(lines))
    records = (run.output / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    replace_text(folder / "records.jsonl", "".join(records[-_NUM_RECORDS:]))
    replace_text(folder / "run.yaml", to_yaml(run))
    return folder


def _order(norm: float) -> tuple[bool, float]:
    return math.isfinite(norm), -norm if math.isfinite(norm) else 0.0


def _sequences(stream: Stream, skipped: SkippedStep) -> Iterator[dict[str, Any]]:
    sequences = [row for n, batch in enumerate(skipped.window) for row in _cut(batch, n)]
    places = _origins(stream, skipped)
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


def _origins(stream: Stream, skipped: SkippedStep) -> dict[tuple[int, ...], list[str]]:
    """`file:line` of the samples around the step, by their tokens: the data is read again."""
    start = skipped.start._replace(rows=0)
    num_sequences = sum(len(batch.cu_seqlens_S1) for batch in skipped.window)
    count = num_sequences + _MOST_BUFFERS * stream.data.buffer_size
    places: dict[tuple[int, ...], list[str]] = defaultdict(list)
    draws = stream.mix.draws(start.position)
    position, drawn = start.position, next(draws)
    for sample in islice(_readable(stream.samples(start)), count):
        while position < sample.position:
            position, drawn = position + 1, next(draws)
        source, index = drawn
        places[tuple(sample.sample.token_ids)].append(stream.sources[source].where(index))
    return places


def _readable(samples: Iterator[Drawn]) -> Iterator[Drawn]:
    """Up to where too many records are bad: that is not what the run stopped over."""
    with contextlib.suppress(DataError):
        yield from samples
