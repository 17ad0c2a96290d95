"""What a run tells: one log line a step, and `metrics.jsonl` with one object a step.

    step 00120/01000 | loss 2.1034 | lr 2.9e-04 | grad 0.83 | 812 ms | 1,174 tok/s | 2.3 GiB

A record has: step, loss, learning_rate, grad_norm, tokens_per_second, num_tokens and
num_trained_tokens (of this step), total_tokens, seconds, epoch, peak_memory_gib; accuracy (share of
the trained tokens that the model held the likeliest); `skipped` and `skipped_because` where the
step was;
`moe_max_over_mean` and the rest of `erniekit.routing`, and the router's losses, for experts (in the
line `moe max/mean ...`, and of a multimodal model's second bank `vision max/mean ...`);
eval_loss, eval_ppl, eval_accuracy and eval_tokens where the model was evaluated after it (of plain
text eval_bits_per_byte too). Step 0 is the evaluation before training.

Of pairs: num_pairs, and means over them: rewards_chosen and rewards_rejected (beta times what the
policy has gained on the reference, in nats), rewards_margin (their difference; `margin` in the
line), rewards_accuracy (share with a margin above 0, a margin of 0 counting half; `right`); the
same with eval_ before them, and eval_pairs. preference_loss and sft_loss are the two parts of a
loss that has both. Of judged answers: num_answers, kl (the gain of answers to other prompts, which
each is compared with), rewards_chosen and rewards_rejected (of desirable and undesirable ones),
rewards_accuracy (share on their side of kl). Rewards of a reward model are its own numbers.

Of rollouts (stage: UPO), means over all answers of the round that a step learns from, of prompts
left out too: reward, right (share whose first reward is 1), length (tokens), cut_share (those that
reached max_completion_length), entropy (minus the mean log-probability of the drawn tokens, nats),
and dropped_share (of prompts). Of the step: policy_loss, clip_share, kl (k3, nats a token),
pair_loss, pair_margin and pair_accuracy. Evaluation: eval_reward, eval_right, eval_length and
eval_prompts, of greedy answers.
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
    head = f"step {record['step']:0{width}d}/{num_steps:0{width}d}"
    return " | ".join([head, *told(record).values()])


def told(record: dict[str, Any], *, is_short: bool = False) -> dict[str, str]:
    """What the line of a step says, in its order: `report.bar` takes the parts it has room for.

    Short ones leave out the routers' entropy, and why the step was skipped.
    """
    return {
        "loss": f"loss {record['loss']:.4f}",
        **(_judged(record, "", 0) if "rewards_accuracy" in record else {}),
        **(_rewarded(record) if "reward" in record else {}),
        "lr": f"lr {record['learning_rate']:.1e}",
        "grad": f"grad {record['grad_norm']:.2f}",
        "time": f"{record['seconds'] * 1000:,.0f} ms",
        "speed": f"{record['tokens_per_second']:,.0f} tok/s",
        "memory": f"{record['peak_memory_gib']:.1f} GiB",
        **_routed(record, "moe", "moe_", is_short),
        **_routed(record, "vision", "moe_vision_", is_short),
        **(_skipped(record, is_short) if record.get("skipped") else {}),
    }


def _judged(values: dict[str, Any], prefix: str, digits: int) -> dict[str, str]:
    """Of judged answers; a step with answers of one kind only has no margin."""
    margin = values.get(f"{prefix}rewards_margin")
    right = {"right": f"right {100 * values[f'{prefix}rewards_accuracy']:.{digits}f} %"}
    return right if margin is None else {"margin": f"margin {margin:.4f}"} | right


def _rewarded(record: dict[str, Any]) -> dict[str, str]:
    """Of rollouts."""
    return {
        "reward": f"reward {record['reward']:.4f}",
        "right": f"right {100 * record['right']:.0f} %",
        **({"kl": f"kl {record['kl']:.4f}"} if "kl" in record else {}),
        "entropy": f"entropy {record['entropy']:.2f}",
        "length": f"length {record['length']:.0f}",
    }


def _routed(record: dict[str, Any], bank: str, prefix: str, is_short: bool) -> dict[str, str]:
    """Of the routers of a bank of experts; dead experts only where there are any."""
    if f"{prefix}max_over_mean" not in record:
        return {}
    # In short, behind the same of text, the name alone is clear.
    name = bank if is_short and bank == "vision" else f"{bank} max/mean"
    words = f"{name} {record[f'{prefix}max_over_mean']:.2f}"
    if f"{prefix}entropy" in record and not is_short:
        words += f" entropy {record[f'{prefix}entropy']:.2f}"
    if record.get(f"{prefix}dead_experts"):
        words += f" dead {record[f'{prefix}dead_experts']}"
    return {bank: words}


def _skipped(record: dict[str, Any], is_short: bool) -> dict[str, str]:
    why = "" if is_short else f": {record.get('skipped_because', 'not finite')}"
    return {"skipped": f"SKIPPED{why}"}


def eval_line(values: dict[str, float], step: int) -> str:
    if "eval_reward" in values:
        parts = [
            f"right {100 * values['eval_right']:.1f} %",
            f"length {values['eval_length']:.1f}",
            f"{values['eval_prompts']:,} prompts",
        ]
        head = f"eval at step {step} | reward {values['eval_reward']:.4f}"
        return " | ".join([head, *parts, f"{values['eval_seconds']:.1f} s"])
    if "eval_rewards_accuracy" in values:
        unit = "pairs" if "eval_pairs" in values else "answers"
        parts = [*_judged(values, "eval_", 1).values(), f"{values[f'eval_{unit}']:,} {unit}"]
    else:
        parts = [
            f"ppl {values['eval_ppl']:.2f}",
            *(f"bits/byte {b:.4f}" for k, b in values.items() if k == "eval_bits_per_byte"),
            f"accuracy {100 * values['eval_accuracy']:.1f} %",
            f"{values['eval_tokens']:,} tokens",
        ]
    first, last = f"loss {values['eval_loss']:.4f}", f"{values['eval_seconds']:.1f} s"
    return " | ".join([f"eval at step {step}", first, *parts, last])
