"""How fast does one GPU serve ERNIE-4.5-21B-A3B, beside what its memory and tensor cores allow?

    python benchmarks/engine_gpu.py [--quantization wint8] [--model ERNIE-4.5-21B-A3B]

Random weights made on the device; greedy; whole engine steps, sampling and Python included:

    startup   from the weights to an engine that is ready: packed, kernels compiled, steps recorded
    decode    new tokens per second with 1 and with 64 texts at once, after prompts of 128 tokens
    prefill   prompt tokens per second of one prompt of 8192 tokens, until its first token

Ceilings: a decode step reads the weights of all layers, the experts that a random choice touches,
and the head; prefill does the model's products and attention. Both against the bandwidth of a copy
and the rate of a large product, measured in the same run.
"""

from __future__ import annotations

import argparse
import time

import gpu
import torch
from harness import write_record

from ernie.config import ErnieConfig
from ernie.fused import FusedMoE, fuse
from ernie.model import ErnieModel
from ernie.models import MODELS
from ernie.quant.scheme import read_scheme
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.loading import make_engine
from fastdeploy.sampling import SamplingParams

QUESTION = __doc__.splitlines()[0]
PROMPT, DECODE_PROMPT, NEW = 8192, 128, 256
TEXTS = (1, 64)


def random_model(config: ErnieConfig) -> ErnieModel:
    """Made in bfloat16 at once: the device would not hold it in float32."""
    model = ErnieModel(config, dtype=torch.bfloat16, device="meta").to_empty(device="cuda")
    model.init_weights(seed=0)
    return model


def engine_of(model: ErnieModel, quantization: str | None) -> Engine:
    texts = max(TEXTS)
    config = EngineConfig(
        model="", max_model_len=PROMPT + NEW, max_num_seqs=texts, max_num_batched_tokens=PROMPT,
        enable_prefix_caching=False, num_gpu_blocks_override=texts * 8 + 2 * PROMPT // 64,
    )  # fmt: skip
    longest = model.config.max_position_embeddings
    config = config.resolved(max_positions=longest, device_type=model.device.type)
    scheme = read_scheme(quantization, has_experts=model.config.is_moe)
    return make_engine(fuse(model, scheme), config)


def add(engine: Engine, texts: int, prompt: int, new: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    generator = torch.Generator().manual_seed(texts)
    for i in range(texts):
        ids = torch.randint(10, engine.vocab_size, (prompt,), generator=generator)
        engine.add(str(i), ids.tolist(), params)


def prefill_rate(engine: Engine) -> float:
    """Prompt tokens a second."""
    add(engine, 1, PROMPT, 1)
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return PROMPT / (time.perf_counter() - start)


def decode_rate(engine: Engine, texts: int, new: int = NEW) -> float:
    """New tokens a second, from the step after the one in which the last text began."""
    add(engine, texts, DECODE_PROMPT, new)
    begun: set[str] = set()
    while len(begun) < texts:
        begun |= {output.request_id for output in engine.step()}
    start, count = time.perf_counter(), 0
    while len(engine.requests) == texts:
        count += len(engine.step())
    seconds = time.perf_counter() - start
    while engine.has_work:
        engine.step()
    return count / seconds


def step_bytes(model: ErnieModel, texts: int) -> float:
    """What one decode step has to read of the weights."""
    total = float(model.fused_head.weight.num_bytes)
    for block in model.model.layers:
        mlp = block.mlp
        total += block.qkv.num_bytes + block.out.num_bytes
        if isinstance(mlp, FusedMoE):
            (bank,) = mlp.banks  # of text
            share = 1 - (1 - mlp.top_k / len(bank.router)) ** texts
            total += share * (bank.gate_up.num_bytes + bank.down.num_bytes) + bank.router.nbytes
            total += sum(weight.num_bytes for weight in mlp.shared or ())
        else:
            total += mlp.gate_up.num_bytes + mlp.down.num_bytes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", default="ERNIE-4.5-21B-A3B", choices=MODELS)
    parser.add_argument("--quantization")
    arguments = parser.parse_args()
    gpu.need_gpu()
    where = gpu.device()
    config = MODELS[arguments.model].config
    model = random_model(config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine = engine_of(model, arguments.quantization)
    torch.cuda.synchronize()
    startup_s = time.perf_counter() - start
    bandwidth, rate = where["copied_gb_per_s"] * 1e9, where["bfloat16_tflop_per_s"] * 1e12
    prefill_flop = config.flops_per_token(PROMPT // 2) - 2 * config.vocab_size * config.hidden_size
    ceilings = {"prefill": rate / prefill_flop}
    ceilings |= {f"decode {n}": n * bandwidth / step_bytes(model, n) for n in TEXTS}
    prefill_rate(engine)  # compiles what prompts need
    for texts in TEXTS:
        decode_rate(engine, texts, 8)
    rates = {"prefill": prefill_rate(engine)}
    rates |= {f"decode {n}": decode_rate(engine, n) for n in TEXTS}

    def share(name: str) -> str:
        return f"{rates[name] / ceilings[name]:.0%}"

    table = [["what", "tok/s", "ceiling tok/s", "of ceiling"]]
    for name, value in rates.items():
        table.append([name, f"{value:,.0f}", f"{ceilings[name]:,.0f}", share(name)])
    table.append(["startup", f"{startup_s:.1f} s", "", ""])
    form = arguments.quantization or "bfloat16"
    reading = (
        f"{arguments.model} in {form}: decoding one text reaches {share('decode 1')} of the "
        f"bandwidth, prefill {share('prefill')} of the tensor cores."
    )
    write_record(
        f"gpu_engine_{form}", QUESTION,
        f"python benchmarks/engine_gpu.py --model {arguments.model}"
        + (f" --quantization {form}" if arguments.quantization else ""),
        {"prompt": PROMPT, "decode_prompt": DECODE_PROMPT, "new": NEW},
        {"tok_per_s": rates, "ceilings": ceilings, "startup_s": startup_s}, table, reading,
        where=where,
    )  # fmt: skip


if __name__ == "__main__":
    main()
