"""Evaluation alone: what training left in output_dir, or the base model, on held-out data."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

import ernie
from ernie.settings import ConfigError
from erniekit import checkpoint, lora
from erniekit.build import build_model, read_model
from erniekit.config import Run, resolved
from erniekit.evaluate import evaluate
from erniekit.launch import device_of
from erniekit.metrics import eval_line
from erniekit.recipes import sft
from erniekit.session import load_adapter

log = logging.getLogger("erniekit")

RESULTS_FILE = "eval_results.json"


def evaluate_run(run: Run) -> int:
    """Write `eval_results.json` into output_dir; returns the exit code."""
    if not run.data.eval_dataset_path:
        raise ConfigError("eval_dataset_path is not set; give a .jsonl file of dialogues")
    device = device_of(run)
    run = resolved(run, device)
    folder = trained_folder(run.output)
    model, what = _model(run, device, folder)
    stream = sft.stream(run, "eval")
    limit = run.training.max_evaluate_steps
    batches = stream.batches(run.training.batch_size, end=stream.epoch_size)
    values = evaluate(
        model, islice(batches, limit if limit > 0 else None), run.model.loss_subbatch_seqlen
    )
    stream.faults.judge(at_end=True)
    log.info("evaluated %s", what)
    log.info("%s", eval_line(values, 0).replace("eval at step 0", "eval"))
    run.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": str(what), "num_left_out": stream.faults.total, **values}, indent=2)
    checkpoint.replace_text(run.output / RESULTS_FILE, text + "\n")
    return 0


def _model(run: Run, device: str, folder: Path | None) -> tuple[ernie.ErnieModel, str | Path]:
    if folder is None:
        return read_model(run, device), run.model.model_name_or_path
    if not (folder / lora.ADAPTER_CONFIG).is_file():
        return ernie.load(folder, device=device), folder
    model = build_model(run, device)
    load_adapter(model, run, folder)
    return model, folder


def trained_folder(output: Path) -> Path | None:
    """What training has left in `output`: the final model, else the newest good checkpoint."""
    if any((output / name).is_file() for name in ("config.json", lora.ADAPTER_CONFIG)):
        return output
    return checkpoint.newest_good(output)
