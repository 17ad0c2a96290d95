"""Evaluation alone: what training left in output_dir, or the base model, on held-out data.

Writes eval_results.json (loss, perplexity, token accuracy, or loss and rewards of pairs; mean
scores of the answers, metrics of lm-eval's tasks) and eval_samples.jsonl (each prompt, its
reference and the model's answer), and brings the report.html of a run up to date. Results of the
same model that this evaluation does not find anew stay.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import Any

import ernie
from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError
from erniekit import checkpoint, lora_files
from erniekit.build import build_model, load_adapter, read_model
from erniekit.config import Run, resolved
from erniekit.data.stream import stream
from erniekit.evaluate import eval_batches
from erniekit.launch import device_of, recipe_of, refuse_ranks
from erniekit.method import Method
from erniekit.metrics import METRICS_FILE, eval_line
from erniekit.report import story
from erniekit.report.answers import answers, prompts
from erniekit.report.scores import mean_scores
from erniekit.report.story import RESULTS_FILE, SAMPLES_FILE
from erniekit.reward_model import take_head

log = logging.getLogger("erniekit")


def evaluate_run(run: Run) -> int:
    """Write `eval_results.json` and `eval_samples.jsonl` into output_dir; returns the exit code."""
    if not run.data.files("eval") and not run.reporting.lm_eval_tasks:
        raise ConfigError("eval_dataset_path is not set; give a .jsonl file of records")
    if run.reporting.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval_tasks needs the package lm-eval; pip install lm-eval")
    refuse_ranks("eval")
    checkpoint.refuse_as_input(run.output, run.data_paths)
    manager = _task_manager(run)
    device = device_of(run)
    run = resolved(run, device)
    folder = checkpoint.chosen(run.output, run.training.use_checkpoint)
    method = recipe_of(run).method(run, device, is_kept=False)
    if run.data.files("eval"):
        method.prepare(eval_batches(run, stream(run, "eval")))
    model, what = _model(run, device, folder)
    run.output.mkdir(parents=True, exist_ok=True)
    of_model = {"model": str(what), "weights_ns": _written_ns(what)}
    before = _results_of(run.output / RESULTS_FILE, of_model)
    results: dict[str, Any] = {**of_model, "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if run.data.files("eval"):
        results |= _on_data(run, method, model, what)
        results |= {"lm_eval": before["lm_eval"]} if "lm_eval" in before else {}
        _write(run, results)
    if run.reporting.lm_eval_tasks:
        from erniekit.lm_eval_model import run_tasks

        found = run_tasks(model, run.reporting, run.model.loss_subbatch_seqlen, manager)
        for task, values in found.items():
            log.info("%s | %s", task, " | ".join(f"{k} {v:.4f}" for k, v in values.items()))
        results = before | results
        _write(run, results | {"lm_eval": before.get("lm_eval", {}) | found})
    if (run.output / METRICS_FILE).is_file():
        story.write(run.output)
    return 0


def _task_manager(run: Run) -> Any:
    """What finds the tasks of lm-eval, which are there and have their data; None without any."""
    if not run.reporting.lm_eval_tasks:
        return None
    from erniekit.lm_eval_model import known_tasks

    return known_tasks(run.reporting)


def _written_ns(model: str | Path) -> int | None:
    """When the weights of a folder were written, by which they are known from others there."""
    return max(
        (path.stat().st_mtime_ns for path in Path(model).glob("*.safetensors")), default=None
    )


def _results_of(path: Path, of_model: dict[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the same weights has found."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in of_model.items()):
        log.warning("%s is not of %s as it is now; it is replaced", path, of_model["model"])
        return {}
    return found


def _write(run: Run, results: dict[str, Any]) -> None:
    checkpoint.replace_text(run.output / RESULTS_FILE, json.dumps(results, indent=2) + "\n")


def _on_data(run: Run, method: Method, model: ernie.ErnieModel, what: str | Path) -> dict[str, Any]:
    """Loss and accuracy on the evaluation data, and how near the model's own answers come."""
    held_out = stream(run, "eval")
    values = method.evaluate(model, eval_batches(run, held_out))
    num_left_out = method.num_left_out() if method.num_left_out else held_out.faults.total
    log.info("evaluated %s", what)
    log.info("%s", eval_line(values, 0).replace("eval at step 0", "eval"))
    num_answers = run.reporting.num_answers if run.stage.has_answers else 0
    asked = prompts(held_out, num_answers)
    given = answers(model, asked, run.reporting.max_answer_tokens, step=0)
    lines = [json.dumps({k: v for k, v in a.items() if k != "step"}) + "\n" for a in given]
    checkpoint.replace_text(run.output / SAMPLES_FILE, "".join(lines))
    means = mean_scores(given)
    if means:
        told = " | ".join(f"{name} {value:.3f}" for name, value in means.items())
        log.info("%d answers | %s", len(given), told)
    return {
        "num_left_out": num_left_out,
        **values,
        "answers": {"num_answers": len(given), **means},
    }


def _model(run: Run, device: str, folder: Path | None) -> tuple[ernie.ErnieModel, str | Path]:
    if folder is not None and (folder / lora_files.ADAPTER_CONFIG).is_file():
        model = build_model(run, device)
        load_adapter(model, run, folder)
    else:
        model = read_model(run, device) if folder is None else ernie.load(folder, device=device)
    if run.stage.has_reward_head:  # a new one would answer by chance
        take_head(model, folder or resolve(run.model.model_name_or_path))
    return model.eval(), folder or run.model.model_name_or_path
