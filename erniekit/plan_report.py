"""`erniekit plan`: what a run takes on this machine, what makes it fit, and how wrong the plan was.

Nothing is invented: every suggested change is planned like the run itself, and shown only if it
fits. Degrees of parallelism are read for the arithmetic of one rank whether or not this build runs
them; a file that `erniekit train` would refuse says so in a note.

Refused: a memory that is no positive number, degrees that are not those of `nproc_per_node`
processes, and all that `erniekit.plan` refuses.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ernie.settings import ConfigError, as_word
from erniekit import checkpoint, config, memory
from erniekit.build import config_of
from erniekit.config import Run, resolved, run_from
from erniekit.config.checks import validate
from erniekit.config.model import AUTO, COMPUTE_TYPES
from erniekit.config.stages import TRAINABLE
from erniekit.fit import fitted, limit_of, memory_for
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.parallel.ranks import degrees as copies_and_shards
from erniekit.plan import GIB, Degrees, Plan, plan

log = logging.getLogger("erniekit")

ERROR_FILE = "plan_error.json"
# Keys that divide a model; -1 and nothing mean 1, for sharding what nproc_per_node and
# data_parallel_degree leave.
DEGREES = {
    "tensor": ("tensor_parallel_degree", "tensor_model_parallel_size"),
    "pipeline": ("pipeline_parallel_degree", "pipeline_model_parallel_size"),
    "sharding": ("sharding_parallel_degree", "sharding_parallel_size"),
    "expert": ("expert_parallel_degree", "expert_model_parallel_size"),
}
# Values of other keys that are planned as the default when this build refuses them, and those that
# it knows.
PLANNED_AS = {"stage": ("SFT", TRAINABLE), "compute_type": ("bf16", COMPUTE_TYPES)}

# Dense bfloat16 products, TFLOP/s, of the makers' data sheets; and the share a run is taken to get.
GPU_TFLOPS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
GPU_SHARE = 0.4
CPU_SHARE = 0.7


@dataclass(frozen=True)
class Machine:
    """What a plan is held against: bytes of memory, operations a second, and where that is from."""

    memory: int
    flops_per_second: float
    told: str


@dataclass(frozen=True)
class Change:
    """Settings that make a run fit: what they are, and the run's plan with them."""

    settings: dict[str, Any]
    cost: str
    plan: Plan


def run_plan(words: Sequence[str]) -> int:
    """The verb: prints a table, or with `--json` one object; returns 0, or 1 if it does not fit."""
    words = list(words)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words:
        raise ConfigError("no settings were given; give a .yaml file, or key=value words")
    values, origin = config.read_values(words)
    run, degrees, notes = read_plannable(values, origin)
    device = _device(run)
    run = fitted(resolved(run, device), device, degrees)
    found, here = plan(run, device, degrees), machine(run, device)
    fits = found.peak <= here.memory
    changes = [] if fits else changes_that_fit(run, device, degrees, here.memory)
    if as_json:
        print(json.dumps(_as_dict(run, found, here, degrees, changes, notes), indent=1))
    else:
        print(_table(run, found, here, degrees, changes, notes))
    return 0 if fits else 1


def read_plannable(values: dict[str, Any], origin: str) -> tuple[Run, Degrees, list[str]]:
    """The run without what only divides it, the degrees, and what `train` would say against it."""
    notes = []
    try:
        run_from(values, origin)
    except ConfigError as error:
        notes.append(f"erniekit train would refuse this: {error}")
    rest, given = dict(values), {}
    for name, keys in DEGREES.items():
        given[name] = max((_degree(key, rest.pop(key)) for key in keys if key in rest), default=-1)
    for key, (planned, known) in PLANNED_AS.items():
        if notes and rest.get(key, planned) not in known:
            notes.append(f"planned as {key}={planned}; {key}={rest[key]} is not counted")
            rest[key] = planned
    run = run_from(rest, origin)
    degrees = _degrees(run, given)
    p, sample = run.preferences, run.stage.sample
    is_free = p.reference_free or not p.loss.uses_reference
    if run.stage.sums_log_probs and not is_free:
        read = "answer, and one beside it," if sample == "answer" else sample
        notes.append(
            f"before the first step the reference model reads every {read} of the run once, a "
            "forward pass in no more memory than a step; that time is not counted"
        )
    if run.stage.has_rollouts:
        policy = run.policy
        answers = f"{policy.prompts_per_round} x {policy.num_generations} answers"
        notes.append(
            f"a round draws {answers} of at most {policy.max_completion_length} tokens, at most "
            f"{max(policy.rollout_max_seqs, policy.num_generations)} at once; that time is not "
            "counted"
        )
    return run, degrees, notes


def _degrees(run: Run, given: dict[str, int]) -> Degrees:
    """Those of a run whose model is divided as `given`, with -1 for what is not said.

    Raises ConfigError where `erniekit train` would, for as many processes as the file names.
    """
    tensor, pipeline, expert = (max(given[name], 1) for name in ("tensor", "pipeline", "expert"))
    parallel = dataclasses.replace(run.parallel, sharding_parallel_degree=given["sharding"])
    size = max(given["sharding"], 1) * max(parallel.data_parallel_degree, 1)
    if parallel.nproc_per_node:
        size = max(parallel.nproc_per_node // (tensor * pipeline), 1)
    copies, shards = copies_and_shards(parallel, size)
    copies = max(copies * shards // max(shards, expert), 1)  # experts lie over copies too
    return Degrees(tensor, pipeline, shards, expert, copies)


def _degree(key: str, value: Any) -> int:
    text = str(value).strip().lower()
    if text in ("", "none", "null", "-1"):
        return -1
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key}={value} is not a degree; give -1, or 1, 2..")
    return int(text)


def _device(run: Run) -> str:
    """cpu or cuda as `run` says; a GPU that is not here can be planned for all the same."""
    wanted = {"gpu": "cuda"}.get(run.training.device, run.training.device)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise ConfigError(f"device={run.training.device!r} is not known; use auto, cpu or gpu")
    return wanted


def machine(run: Run, device: str) -> Machine:
    """What a rank has of this machine; a GPU that is not here is taken as an H100 of 80 GB. Takes
    under a second."""
    total = memory_for(run, device)
    if device == "cpu":
        rate = _product_rate()
        told = f"CPU, products measured at {rate / 1e9:.0f} GFLOP/s, of which {CPU_SHARE:.0%}"
        return Machine(total, rate * CPU_SHARE, told)
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "H100"
    peak = next((rate for key, rate in GPU_TFLOPS.items() if key in name), GPU_TFLOPS["A100"])
    told = f"{name}, {peak:g} TFLOP/s by the table, of which {GPU_SHARE:.0%} assumed"
    return Machine(total, peak * 1e12 * GPU_SHARE, told)


def _product_rate(size: int = 768, repeats: int = 5) -> float:
    """Operations a second of float32 products, by the best of a few."""
    a = torch.ones(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# --- what makes it fit ---


_Candidate = tuple[dict[str, Any], str]  # settings, and what they cost


def _exact_candidates(run: Run, device: str, limit: int) -> list[_Candidate]:
    """Single changes that cost time and nothing else, cheapest first."""
    model, training, o = run.model, run.training, run.optimisation
    found: list[_Candidate] = []
    if model.loss_subbatch_seqlen > 64:
        found.append(({"loss_subbatch_seqlen": 64}, "smaller products in the loss"))
    if training.batch_size > 1:
        rows = training.batch_size * training.gradient_accumulation_steps
        split = {"batch_size": 1, "gradient_accumulation_steps": rows}
        found.append((split, "the same step in smaller passes"))
    lower = {"plan_memory_gib": limit * 100 // GIB / 100} if limit < limit_of(run, device) else {}
    by_hand: dict[str, Any] = {"recompute_layers": ()} if model.recompute_layers else {}
    if run.chooses_layers and lower:
        found.append((lower, "more is computed twice"))
    elif by_hand or not (model.recompute and model.recompute_granularity in ("full", AUTO)):
        again = {"recompute": True, "recompute_granularity": AUTO} | by_hand | lower
        found.append((again, "as much as has to be is computed twice"))
    if training.use_async_save and run.training.device != "gpu":
        found.append(({"use_async_save": False}, "training waits while a checkpoint is written"))
    if device != "cpu" and not o.offload_optim:
        found.append(({"offload_optim": True}, "its state goes to the GPU and back"))
    return found


def _other_candidates(run: Run) -> list[_Candidate]:
    """Single changes after which the result is another, the smallest difference first."""
    o = run.optimisation
    found: list[_Candidate] = []
    if not o.use_lowprecision_moment:
        found.append(({"use_lowprecision_moment": True}, "moments are rounded, without bias"))
    if o.amp_master_grad and not run.is_lora:
        found.append(({"amp_master_grad": False}, "sums of gradients are rounded"))
    is_gathered = run.parallel.sharding in ("stage2", "stage3")  # as weights in few bits are not
    if run.is_lora and run.model.compute_type == "bf16" and not is_gathered:
        found.append(({"compute_type": "wint8"}, "frozen weights in 8 bits"))
        if config_of(run.model.model_name_or_path).is_moe:
            told = "frozen weights of experts in 4 bits, others in 8"
            found.append(({"compute_type": "wint4/8"}, told))
        found.append(({"compute_type": "nf4"}, "frozen weights in 4 bits"))
    above = "dialogues are cut to"
    if run.stage.sample == "pair":
        above = "pairs lose turns, or are left out, above"
    lengths = [n for n in (32768, 16384, 8192, 4096, 2048, 1024, 512) if n < run.data.max_seq_len]
    found += [({"max_seq_len": n}, f"{above} {n} tokens") for n in lengths]
    if not run.is_lora:
        found.append(({"fine_tuning": "LoRA"}, "only adapters are trained"))
    return found


def changes_that_fit(run: Run, device: str, degrees: Degrees, limit: int) -> list[Change]:
    """At most three changes that fit: those that only cost time, then others; of both single ones,
    then pairs; each cheapest first.
    """
    exact = _exact_candidates(run, device, limit)
    found: list[Change] = []
    for candidates in (exact, exact + _other_candidates(run)):
        for size in (1, 2):
            for group in itertools.combinations(candidates, size):
                settings = {key: value for change, _ in group for key, value in change.items()}
                if len(settings) < sum(len(change) for change, _ in group):
                    continue  # two values of one
                if any(change.settings.items() <= settings.items() for change in found):
                    continue  # more than what already fits
                try:
                    validate(changed := _changed(run, settings, device))
                except ConfigError:  # it would be refused
                    continue
                changed = fitted(changed, device, degrees)
                planned = plan(changed, device, degrees)
                is_less = all(
                    planned.peak < other.plan.peak or settings.keys() != other.settings.keys()
                    for other in found
                )
                if planned.peak <= limit and is_less:
                    cost = "; ".join(cost for _, cost in group)
                    found.append(Change(settings, cost, planned))
                    if len(found) == 3:
                        return found
    return found


def _changed(run: Run, settings: dict[str, Any], device: str) -> Run:
    """The run with other settings, as if its file had said so."""
    groups = {}
    for name in ("model", "data", "training", "optimisation"):
        group = getattr(run, name)
        own = {f.name for f in dataclasses.fields(group)} & set(settings)
        groups[name] = dataclasses.replace(group, **{key: settings[key] for key in own})
    if settings.get("fine_tuning") == "LoRA":  # its precisions are not those chosen for Full
        free = {"amp_master_grad": None, "use_lowprecision_moment": None} | {
            key: settings[key] for key in ("use_lowprecision_moment",) if key in settings
        }
        groups["optimisation"] = dataclasses.replace(groups["optimisation"], **free)
    return resolved(dataclasses.replace(run, **groups), device)


# --- for people and for programs ---


def _num_checkpoints(run: Run) -> int | None:
    """How many a run makes; None where that follows from its data."""
    t = run.training
    every = t.interval(t.save_strategy, t.save_steps, max(t.max_steps, 0))
    stop = t.stop_after_step or 0  # which is saved whatever the strategy
    if not every:
        return int(stop > 0)
    if t.max_steps <= 0:
        return None
    return -(-t.max_steps // every) + (0 < stop < t.max_steps and stop % every > 0)


def _most_checkpoints(run: Run) -> int | None:
    """How many `save_total_limit` leaves at once: one more than are kept, while it is written."""
    limit, has_best = run.training.save_total_limit, run.training.evaluation_strategy != "no"
    return max(limit, 1 + has_best) + 1 if limit else None  # the newest stays beside the best


def _disk(run: Run, found: Plan) -> int | None:
    """Bytes on disk at the most: checkpoints that lie there at once, and the final model; None
    where the number of steps follows from the data.
    """
    made = _num_checkpoints(run)
    if made is None:
        return None
    at_once = min(made, _most_checkpoints(run) or made)
    return at_once * found.checkpoint_bytes + found.final_bytes


def _disk_line(run: Run, found: Plan) -> str:
    one, final, total = found.checkpoint_bytes, found.final_bytes, _disk(run, found)
    if total is not None:
        return f"disk: {_size(total)}; a checkpoint is {_size(one)}, the final model {_size(final)}"
    most = _most_checkpoints(run)
    told = "their number depends on the data" + (f", at most {most} at once" if most else "")
    return f"disk: {_size(one)} per checkpoint ({told}); the final model is {_size(final)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"


def _as_dict(
    run: Run,
    found: Plan,
    here: Machine,
    degrees: Degrees,
    changes: list[Change],
    notes: list[str],
) -> dict[str, Any]:
    return {
        "model": run.model.model_name_or_path,
        "fits": found.peak <= here.memory,
        "peak_bytes": found.peak,
        "memory_bytes": here.memory,
        "moment": found.moment,
        "parts": found.parts,
        "num_params": found.num_params,
        "num_trained": found.num_trained,
        "ranks": degrees.num_ranks,
        "copies": degrees.copies,
        "tokens_per_step": found.tokens_per_step,
        "flops_per_step": found.flops_per_step,
        "seconds_per_step": found.flops_per_step / here.flops_per_second,
        "steps": run.training.max_steps if run.training.max_steps > 0 else None,
        "checkpoint_bytes": found.checkpoint_bytes,
        "final_bytes": found.final_bytes,
        "disk_bytes": _disk(run, found),
        "machine": here.told,
        "changes": [
            {"settings": c.settings, "cost": c.cost, "peak_bytes": c.plan.peak} for c in changes
        ],
        "recompute_layers": list(run.chosen_layers or run.model.recompute_layers),
        "offloaded_bytes": found.offloaded_bytes,
        "copied_bytes": found.copied_bytes,
        "notes": notes,
    }


def _table(
    run: Run,
    found: Plan,
    here: Machine,
    degrees: Degrees,
    changes: list[Change],
    notes: list[str],
) -> str:
    seconds = found.flops_per_step / here.flops_per_second
    fits = "fits" if found.peak <= here.memory else "does not fit"
    rows = [f"  {name:<14}{size / GIB:>10.2f} GiB" for name, size in found.parts.items() if size]
    steps, num_ranks = run.training.max_steps, degrees.num_ranks * degrees.copies
    ranks = f" of {num_ranks} ranks" if num_ranks > 1 else ""
    length = f", {steps} steps {_duration(steps * seconds)}" if steps > 0 else ""
    lines = [
        f"{run.model.model_name_or_path}: {found.num_trained:,} of {found.num_params:,} parameters "
        f"trained ({run.model.fine_tuning})",
        f"memory{ranks and f' of one{ranks}'}, at its peak ({found.moment}):",
        *rows,
        f"  {'together':<14}{found.peak / GIB:>10.2f} GiB, which {fits} in {here.memory / GIB:.2f}",
        f"a step: {found.tokens_per_step:,} tokens{ranks}, {found.flops_per_step / 1e12:.3g} TFLOP"
        f"{' a rank' if ranks else ''}, {_duration(seconds)}{length} ({here.told})",
        _disk_line(run, found),
    ]
    if run.chooses_layers:
        lines.append(f"computed again: {', '.join(run.chosen_layers) or 'nothing'}")
    if found.offloaded_bytes:
        lines.append(f"the host's memory, for each rank: {_size(found.offloaded_bytes)} pinned")
    if found.copied_bytes:
        lines.append(f"the host's memory, for the copy to write: {_size(found.copied_bytes)}")
    if changes:
        lines.append("changes that make it fit, cheapest first:")
    elif found.peak > here.memory:
        lines.append("no two settings make it fit; divide it over ranks, or take a smaller model")
    for c in changes:
        words = " ".join(f"{key}={as_word(value)}" for key, value in c.settings.items())
        saved = (found.peak - c.plan.peak) / GIB
        more = c.plan.flops_per_step / c.plan.tokens_per_step
        share = more / (found.flops_per_step / found.tokens_per_step) - 1
        lines.append(
            f"  {words}\n      {c.plan.peak / GIB:.2f} GiB, {saved:.2f} less; {share:+.0%} "
            f"arithmetic a token; {c.cost}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


# --- after a run ---


def record_error(run: Run, device: str, first_step: int = 1, ranks: Ranks = ALONE) -> None:
    """Write planned and measured peak and step time of a rank beside the metrics of a run that
    ended: of the steps since this start of it, those before may be of other ranks and settings.
    """
    lines = (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if "seconds" in r and r["step"] >= first_step]
    if not steps:
        return
    degrees = Degrees(sharding=ranks.shards, copies=ranks.copies)
    found, here = plan(run, device, degrees), machine(run, device)
    measured = memory.peak_gib(torch.device(device))
    values = {
        "planned_peak_gib": found.peak / GIB,
        "measured_peak_gib": measured,
        "planned_seconds": found.flops_per_step / here.flops_per_second,
        "measured_seconds": median(r["seconds"] for r in steps),
    }
    told = ""
    if not run.stage.has_rollouts:  # whose steps hold what a round has, not rows that are filled
        filled = median(r["num_tokens"] for r in steps)
        values["row_fill"] = filled / found.tokens_per_step
        told = f" (rows {100 * values['row_fill']:.0f} % full)"
    checkpoint.replace_text(Path(run.output) / ERROR_FILE, json.dumps(values, indent=1) + "\n")
    log.info(
        "plan: %.2f GiB planned, %.2f measured; a step %s planned, %s measured%s",
        values["planned_peak_gib"],
        measured,
        _duration(values["planned_seconds"]),
        _duration(values["measured_seconds"]),
        told,
    )
