"""What a run tells: one log line a step, and `metrics.jsonl` with one object a step.

    step 00120/01000 | loss 2.1034 | lr 2.9e-04 | grad 0.83 | 812 ms | 1,174 tok/s | 2.3 GiB

A record has: step, loss, learning_rate, grad_norm, tokens_per_second, num_tokens and
num_trained_tokens (of this step), total_tokens, seconds, epoch, peak_memory_gib; accuracy (share of
the trained tokens that the model held the likeliest); `skipped` and `skipped_because` where the
step was;
`moe_max_over_mean` and the rest of `erniekit.routing`, and the router's losses, for experts;
eval_loss, eval_ppl, eval_accuracy and eval_tokens where the model was evaluated after it (of plain
text eval_bits_per_byte too). Step 0 is the evaluation before training.

Of pairs: num_pairs, and means over them: rewards_chosen and rewards_rejected (beta times what the
policy has gained on the reference, in nats), rewards_margin (their difference; `margin` in the
line), rewards_accuracy (share with a margin above 0, a margin of 0 counting half; `right`); the
same with eval_ before them, and eval_pairs. preference_loss and sft_loss are the two parts of a
loss that has both. Of judged answers: num_answers, kl (the gain of answers to other prompts, which
each is compared with), rewards_chosen and rewards_rejected (of desirable and undesirable ones),
rewards_accuracy (share on their side of kl). Rewards of a reward model are its own numbers.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from erniekit.checkpoint import replace_text

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Records of a run on disk, one JSON object a line, appended step by step."""

    def __init__(self, output: Path, name: str = METRICS_FILE) -> None:
        self.path = output / name

    def rewind(self, step: int) -> None:
        """Drop records after `step` (and a half-written one), so that every step appears once."""
        lines = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                if 0 <= _step_of(line) <= step:
                    lines.append(line + "\n")
        replace_text(self.path, "".join(lines))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _step_of(line: str) -> int:
    """-1 for a line that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: such a number is written as null."""
    bad = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return record | bad


def line(record: dict[str, Any], num_steps: int) -> str:
    """The log line of a step."""
    width = max(len(str(num_steps)), 5)
    parts = [
        f"step {record['step']:0{width}d}/{num_steps:0{width}d}",
        f"loss {record['loss']:.4f}",
        f"lr {record['learning_rate']:.1e}",
        f"grad {record['grad_norm']:.2f}",
        f"{record['seconds'] * 1000:,.0f} ms",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{record['peak_memory_gib']:.1f} GiB",
    ]
    if "rewards_accuracy" in record:
        parts[2:2] = _judged(record, "", 0)
    if "moe_max_over_mean" in record:
        told = f"moe max/mean {record['moe_max_over_mean']:.2f}"
        if "moe_entropy" in record:
            told += f" entropy {record['moe_entropy']:.2f}"
        if record.get("moe_dead_experts"):
            told += f" dead {record['moe_dead_experts']}"
        parts.append(told)
    if record.get("skipped"):
        parts.append(f"SKIPPED: {record.get('skipped_because', 'not finite')}")
    return " | ".join(parts)


def _judged(values: dict[str, Any], prefix: str, digits: int) -> list[str]:
    """Of judged answers; a step with answers of one kind only has no margin."""
    margin = values.get(f"{prefix}rewards_margin")
    right = f"right {100 * values[f'{prefix}rewards_accuracy']:.{digits}f} %"
    return [right] if margin is None else [f"margin {margin:.4f}", right]


def eval_line(values: dict[str, float], step: int) -> str:
    if "eval_rewards_accuracy" in values:
        unit = "pairs" if "eval_pairs" in values else "answers"
        parts = [*_judged(values, "eval_", 1), f"{values[f'eval_{unit}']:,} {unit}"]
    else:
        parts = [
            f"ppl {values['eval_ppl']:.2f}",
            *(f"bits/byte {b:.4f}" for k, b in values.items() if k == "eval_bits_per_byte"),
            f"accuracy {100 * values['eval_accuracy']:.1f} %",
            f"{values['eval_tokens']:,} tokens",
        ]
    first, last = f"loss {values['eval_loss']:.4f}", f"{values['eval_seconds']:.1f} s"
    return " | ".join([f"eval at step {step}", first, *parts, last])
