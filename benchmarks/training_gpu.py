"""What share of one GPU's bfloat16 peak does full fine-tuning reach?

    python benchmarks/training_gpu.py [--cases dense,packed,moe] [--order fixed|free]
    python benchmarks/training_gpu.py --profile | --attention    (print; no record)

Whole steps of the real loop (`erniekit.loop`, next-token loss, clipping, AdamW with float32
originals of the bfloat16 weights), on random weights and tokens made on the spot:

    dense    ERNIE-4.5-0.3B, rows of 8192 tokens that are one segment each
    packed   the same, eight segments of different lengths in a row
    moe      a slice of ERNIE-4.5-21B-A3B: all widths, the dense layer and four MoE layers, two
             forward passes a step
    ..._fp8  the same with the products of the blocks in FP8, but for the gradients of weights
    dense_offload    the optimizer's state in the host's memory (`offload_optim`)
    dense_recompute  whole blocks computed again

The peer is transformers on the rows of `dense` and `moe`: sdpa, bfloat16 weights, gradients and
moments without originals, torch's fused AdamW, no clipping; two rows at a time, which is what fits.

Operations are those of the model, three times a forward pass, attention counted causally (a token
sees half of its segment on average), nothing for what is computed twice. MFU is their rate over 989
TFLOP/s, and over the rate of a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu
import numpy as np
import torch
import torch.nn.functional as F
from harness import write_record
from torch.nn.attention import SDPBackend, sdpa_kernel

from ernie import kernels
from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.models import MODELS
from erniekit import launch, losses
from erniekit.build import multiply_in_fp8, trained_parameters
from erniekit.config import Optimisation, resolved, run_from
from erniekit.data.batch import Batch
from erniekit.data.pack import Cursor
from erniekit.gradients import Gradients, SummedEmbedding
from erniekit.loop import Parts, Progress, train
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.recompute import recompute

QUESTION = __doc__.splitlines()[0]
PEAK_TFLOP = 989.0  # of an H100 SXM or H200, bfloat16, dense
ROW, WARM, STEPS = 8192, 3, 5
SEGMENTS = (2048, 512, 1024, 1536, 256, 1280, 768, 768)  # of a row
MOE_LAYERS = 4
PEER_ROWS = 2  # at once: the peer holds all logits, in float32 too


@dataclasses.dataclass(frozen=True)
class Case:
    config: ErnieConfig
    segments: tuple[int, ...]  # of one row
    rows: int  # of one step
    parts: int = 1  # forward passes of one step
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the run
    has_peer: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * ROW

    @property
    def flop(self) -> float:
        """Operations of one step."""
        of_row = sum(n * self.config.flops_per_token((n + 1) / 2) for n in self.segments)  # type: ignore[arg-type]
        return 3 * self.rows * of_row


def cases(moe_layers: int, optim: str) -> dict[str, Case]:
    dense = MODELS["ERNIE-4.5-0.3B"].config
    whole = MODELS["ERNIE-4.5-21B-A3B"].config
    slice_ = dataclasses.replace(
        whole, num_hidden_layers=whole.moe_layer_start_index + moe_layers, moe_layer_end_index=-1
    )
    found = {
        "dense": Case(dense, (ROW,), 4),
        "packed": Case(dense, SEGMENTS, 4, has_peer=False),
        "moe": Case(slice_, (ROW,), 4, parts=2, settings={"optim": optim}),
    }
    forms = {
        "dense_fp8": {"compute_type": "fp8", "quant_input_grad": True},
        "moe_fp8": {"compute_type": "fp8", "quant_input_grad": True},
        "dense_offload": {"offload_optim": True},
        "dense_recompute": {"recompute": True},
    }
    for name, more in forms.items():
        of = found[name.partition("_")[0]]
        found[name] = dataclasses.replace(of, settings=of.settings | more, has_peer=False)
    return found


def batches(case: Case) -> Iterator[Batch]:
    generator = np.random.default_rng(0)
    lengths, tokens = case.segments * (case.rows // case.parts), case.tokens // case.parts
    positions = np.concatenate([np.arange(n) for n in lengths])
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    while True:
        ids = generator.integers(10, case.config.vocab_size, tokens + 1)
        yield Batch(ids[:-1], ids[1:], positions, bounds, Cursor(), tokens, tokens)


class Clock:
    """Moments on the device between the parts of a step."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        """What follows belongs to `part`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def around(self, function: Callable, part: str, then: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(part)
            result = function(*args, **kwargs)
            self.mark(then)
            return result

        return timed

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Of each part, per step."""
        torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for (part, start), (_, end) in zip(self.marks, self.marks[1:]):
            sums[part] = sums.get(part, 0.0) + start.elapsed_time(end) / steps
        self.marks.clear()
        return sums


def our_parts(case: Case, clock: Clock) -> Parts:
    """As `erniekit.start` and `erniekit.session` put them together."""
    run = resolved(run_from({"fine_tuning": "Full"} | case.settings), "cuda")
    model = ErnieModel(case.config, device="meta").to_empty(device="cuda")
    model.init_weights(seed=0)
    if run.model.compute_type == "fp8":
        multiply_in_fp8(model, quant_input_grad=run.model.quant_input_grad)
    recompute(model, run.recomputed)
    trained = trained_parameters(model)
    embedding = model.model.embed_tokens
    dtype = torch.float32 if run.optimisation.amp_master_grad else torch.bfloat16
    gradients = Gradients(trained, dtype, float32_for=(model.head_weight, embedding.weight))
    model.model.embed_tokens = SummedEmbedding(embedding, gradients)
    rules = treatments(trained, run.optimisation, num_layers=case.config.num_hidden_layers)
    optimizer = OPTIMIZERS[run.optimisation.optim](trained, rules, run.optimisation, seed=0)
    loss = partial(
        losses.next_token, chunk_size=run.model.loss_subbatch_seqlen, gradients=gradients
    )
    settings: Optimisation = run.optimisation
    gradients.norm = clock.around(gradients.norm, "norm", "wait")  # type: ignore[method-assign]
    optimizer.step = clock.around(optimizer.step, "optimizer", "rest")  # type: ignore[method-assign]
    return Parts(
        model, clock.around(loss, "forward and head", "backward"), optimizer, gradients, settings,
        WARM + STEPS, case.parts, 1, run.training,
    )  # fmt: skip


def run_ours(case: Case, profiler: torch.profiler.profile | None) -> dict[str, Any]:
    clock = Clock()
    parts = our_parts(case, clock)
    begun, values = 0.0, []

    def after_step(record: dict[str, Any]) -> bool:
        nonlocal begun
        values.append(record["loss"])
        if record["step"] == WARM:
            torch.cuda.synchronize()
            clock.marks.clear()
            begun = time.perf_counter()
            if profiler:
                profiler.start()
        return False

    train(parts, batches(case), Progress(), after_step)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / STEPS
    if profiler:
        profiler.stop()
    return {"seconds": seconds, "losses": values, "milliseconds": clock.milliseconds(STEPS)}


def run_transformers(case: Case) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = case.config.to_dict()
    kind = values.pop("model_type")
    config = AutoConfig.for_model(kind, **values, attn_implementation="sdpa")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    clock, stream, losses_seen, begun = Clock(), batches(case), [], 0.0
    for step in range(WARM + STEPS):
        if step == WARM:
            torch.cuda.synchronize()
            clock.marks.clear()
            begun = time.perf_counter()
        ids = np.concatenate([next(stream).token_ids_T for _ in range(case.parts)])
        ids = torch.from_numpy(ids).view(case.rows, ROW).cuda()
        total = torch.zeros((), device="cuda")
        for part in ids.split(PEER_ROWS):
            clock.mark("forward and head")
            loss = model(input_ids=part, labels=part, use_cache=False).loss
            clock.mark("backward")
            (loss * len(part) / case.rows).backward()
            total += loss.detach() * len(part) / case.rows
        clock.mark("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("rest")
        losses_seen.append(float(total))
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / STEPS
    return {"seconds": seconds, "losses": losses_seen, "milliseconds": clock.milliseconds(STEPS)}


def measured(case: Case, run: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """What a side's steps took, or why they could not be done."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        result = run(case)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    return result | {
        "tokens_per_s": case.tokens / result["seconds"],
        "tflop_per_s": case.flop / result["seconds"] / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def row_of(side: str, found: dict[str, Any], rate: float) -> list[str]:
    if "error" in found:
        return [side, found["error"], *[""] * 6]
    flop = found["tflop_per_s"]
    parts = " + ".join(f"{k} {v:.1f}" for k, v in found["milliseconds"].items() if v >= 0.05)
    return [
        side, f"{found['tokens_per_s']:,.0f}", f"{flop:.0f}", f"{flop / PEAK_TFLOP:.1%}",
        f"{flop / rate:.1%}", f"{found['peak_gib']:.1f}", f"{found['seconds'] * 1e3:.1f}", parts,
    ]  # fmt: skip


def profiled(case: Case) -> None:
    """Kernels by the time they take, and operations of the host."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities)
    found = measured(case, lambda case: run_ours(case, profiler))
    rows = [
        (event.self_device_time_total / STEPS, event.count / STEPS, event.key)
        for event in profiler.key_averages()
        if event.self_device_time_total and event.device_type != torch.autograd.DeviceType.CPU
    ]
    total = sum(us for us, _, _ in rows)
    print(f"kernels {total / 1e3:.1f} ms a step of {found.get('seconds', 0) * 1e3:.1f} ms")
    for us, count, name in sorted(rows, reverse=True)[:45]:
        print(f"{us / 1e3:9.3f} ms {us / total:6.1%} {count:7.1f} x  {name[:110]}")


def attention(case: Case) -> None:
    """Attention alone, forward and backward: ours over packed rows, torch's over separate ones."""
    case = dataclasses.replace(case, parts=1)
    c, scale = case.config, case.config.head_dim**-0.5
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    bounds = torch.tensor(next(batches(case)).cu_seqlens_S1, device="cuda")
    q, k, v = (
        torch.randn(case.tokens, n, c.head_dim, device="cuda").bfloat16().requires_grad_()
        for n in heads
    )

    def by_torch(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def attend() -> torch.Tensor:
            rows = (x.view(case.rows, ROW, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

        return attend

    lengths = tuple(bounds.diff().tolist())
    sides = {"attend_packed": lambda: kernels.attend_packed(q, k, v, bounds, scale, lengths)}
    if case.segments == (ROW,):
        sides |= {
            f"torch {backend.name}": by_torch(backend)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        }
    pairs = case.rows * sum(n * (n + 1) / 2 for n in case.segments)
    for name, attend in sides.items():
        clock = Clock()
        try:
            for step in range(WARM + STEPS):
                if step == WARM:
                    clock.milliseconds(1)
                clock.mark("forward")
                out = attend()
                clock.mark("backward")
                torch.autograd.grad(out, (q, k, v), out)
                clock.mark("rest")
        except RuntimeError as error:
            print(f"{name:<24} {str(error).splitlines()[0]}")
            continue
        found = clock.milliseconds(STEPS)
        rates = {
            part: times * 4 * c.q_size * pairs / found[part] / 1e9
            for part, times in (("forward", 1), ("backward", 2))
        }
        told = ", ".join(f"{p} {found[p]:.2f} ms {rates[p]:.0f} TFLOP/s" for p in rates)
        print(f"{name:<24} {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--cases", default="dense,packed,moe,dense_fp8,moe_fp8,dense_offload")
    parser.add_argument("--moe-layers", type=int, default=MOE_LAYERS)
    parser.add_argument("--optim", default="adamw", choices=("adamw", "adamw_8bit"), help="of moe")
    parser.add_argument("--order", default="fixed", choices=("fixed", "free"), help="of sums")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print kernels; no record")
    parser.add_argument("--attention", action="store_true", help="attention alone; no record")
    arguments = parser.parse_args()
    gpu.need_gpu()
    known = cases(arguments.moe_layers, arguments.optim)
    chosen = {name: known[name] for name in arguments.cases.split(",")}
    if arguments.order == "fixed":
        launch.repeatable()
    if arguments.profile or arguments.attention:
        for name, case in chosen.items():
            print(f"\n{name}: {case.tokens} tokens a step")
            (profiled if arguments.profile else attention)(case)
        return
    where = gpu.device()
    rate = float(where["bfloat16_tflop_per_s"])
    results: dict[str, dict[str, Any]] = {}
    for name, case in chosen.items():
        results[name] = measured(case, lambda case: run_ours(case, None))
        if case.has_peer and not arguments.no_peer:
            results[f"{name}, transformers"] = measured(case, run_transformers)
    header = ["what", "tok/s", "TFLOP/s", "MFU of 989", "of product", "GiB", "ms", "ms by part"]
    table = [header, *(row_of(name, found, rate) for name, found in results.items())]
    ours = {name: results[name] for name in chosen if "error" not in results[name]}
    reading = "; ".join(
        f"{name} {found['tflop_per_s'] / PEAK_TFLOP:.1%} of 989 TFLOP/s"
        for name, found in ours.items()
    )
    settings = {
        "row": ROW, "segments": SEGMENTS, "steps": STEPS, "order": arguments.order,
        "gflop_per_token": {n: round(c.flop / c.tokens / 1e9, 3) for n, c in chosen.items()},
        "layers": {n: c.config.num_hidden_layers for n, c in chosen.items()},
        "of the run": {n: c.settings for n, c in chosen.items()},
        "flop": "3 x forward, attention causal, nothing for recomputation",
    }  # fmt: skip
    write_record(
        "gpu_training", QUESTION,
        f"python benchmarks/training_gpu.py --cases {arguments.cases} --order {arguments.order}",
        settings, results, table, f"MFU of full fine-tuning: {reading}.", where=where,
    )  # fmt: skip


if __name__ == "__main__":
    main()
