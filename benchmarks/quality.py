"""What do 8 and 4 bits cost in perplexity, in ours and in llama.cpp, on the same model and text?

    python benchmarks/quality.py [--windows 40]

The model is the imported SmolLM2 in bfloat16; llama.cpp reads our F16 export of it and its own Q8_0
and Q4_0 of that file. The text is English that no calibration has seen (there is none): answers of
`examples/data/sft-train.jsonl`, docstrings of Python, cut into windows of 512 tokens. Each window
is read from its start; its second half is scored, so that every scored token has a context.

Besides the perplexities, the table has the change against the same program's 16-bit weights, and
ours against theirs, each with its standard error over windows, which the windows' common difficulty
does not enlarge.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import ROOT, smollm2_gguf, write_record

QUESTION = __doc__.splitlines()[0]
WINDOW, SCORED_FROM = 512, 256
FORMS = {"ours wint8": "wint8", "ours wint4": "wint4"}
KINDS = ("F16", "Q8_0", "Q4_0")
# Ours, theirs: no worse; and the bound on our 8 bits.
TARGETS = (("ours wint8", "llama.cpp Q8_0"), ("ours wint4", "llama.cpp Q4_0"))
WINT8_PERCENT = 0.5

Losses = list[float]  # the mean negative log-likelihood of each window's scored tokens


def windows(folder: Path, count: int) -> list[list[int]]:
    from ernie.tokenizer import Tokenizer

    lines = (ROOT / "examples/data/sft-train.jsonl").read_text("utf-8").splitlines()
    text = "\n\n".join(answer for line in lines for answer in json.loads(line)["tgt"])
    ids = Tokenizer.from_folder(folder).encode(text)
    available = len(ids) // WINDOW
    if count > available:
        raise SystemExit(f"the text has {available} windows; --windows takes at most so many")
    # Spread over the whole text, which is sorted by module.
    starts = [WINDOW * (i * available // count) for i in range(count)]
    return [ids[start : start + WINDOW] for start in starts]


def ours(folder: Path, texts: list[list[int]], quantization: str | None) -> Losses:
    """Through the engine's own prompt log-probabilities, as a user of the server gets them."""
    from fastdeploy import LLM, SamplingParams

    options = {"quantization": quantization} if quantization else {}
    llm = LLM(
        str(folder), max_model_len=WINDOW + 1, max_num_seqs=1, enable_logprob=True,
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    losses = []
    for text in texts:
        (answer,) = llm.generate(text, params, use_tqdm=False)
        scores = answer.prompt_logprobs[SCORED_FROM:]
        found = [scored[token].logprob for scored, token in zip(scores, text[SCORED_FROM:])]
        losses.append(-sum(found) / len(found))
    return losses


def llama_cpp(path: Path, texts: list[list[int]]) -> Losses:
    import numpy as np
    from llama_cpp_peer import LlamaCpp

    llama = LlamaCpp(path)
    llama.reserve(WINDOW)
    losses = []
    for text in texts:
        llama.clear()
        # The logits at a token are about the next one.
        llama.decode([(token, i, 0, i >= SCORED_FROM - 1) for i, token in enumerate(text)])
        total = 0.0
        for i in range(SCORED_FROM - 1, WINDOW - 1):
            logits_V = llama.logits(i).astype(np.float64)
            top = logits_V.max()
            total += math.log(np.exp(logits_V - top).sum()) + top - logits_V[text[i + 1]]
        losses.append(total / (WINDOW - SCORED_FROM))
    return losses


def measure(folder: Path, count: int) -> dict[str, Losses]:
    from llama_cpp_peer import library, quantized

    from ernie.checkpoint.gguf import import_gguf
    from ernie.checkpoint.gguf_export import export_gguf

    library()
    model, f16 = folder / "model", folder / "F16.gguf"
    import_gguf(smollm2_gguf(), model, dtype="bfloat16")
    export_gguf(model, f16, dtype="f16")
    texts = windows(model, count)
    sides: dict[str, Callable[[], Losses]] = {"ours bf16": lambda: ours(model, texts, None)}
    for side, form in FORMS.items():
        sides[side] = lambda form=form: ours(model, texts, form)
    for kind in KINDS:
        path = f16 if kind == "F16" else quantized(f16, folder / f"{kind}.gguf", kind)
        sides[f"llama.cpp {kind}"] = lambda path=path: llama_cpp(path, texts)
    return {side: run() for side, run in sides.items()}


def change(losses: Losses, base: Losses) -> tuple[float, float]:
    """Percent by which the perplexity grows, and the standard error of that."""
    gaps = [a - b for a, b in zip(losses, base)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1)
    ratio = math.exp(mean)
    return 100 * (ratio - 1), 100 * ratio * math.sqrt(variance / len(gaps))


def report(results: dict[str, Losses]) -> None:
    bases = {s: "ours bf16" if s.startswith("ours") else "llama.cpp F16" for s in results}
    grown = {side: change(losses, results[bases[side]]) for side, losses in results.items()}
    changes = {side: percent for side, (percent, _) in grown.items()}
    table = [["side", "perplexity", "against 16 bits", "standard error", "target"]]
    for side, losses in results.items():
        percent, error = grown[side]
        cells = ["", ""] if side == bases[side] else [f"{percent:+.2f} %", f"{error:.2f} %"]
        perplexity = f"{math.exp(sum(losses) / len(losses)):.3f}"
        table.append([side, perplexity, *cells, _result(side, results, changes)])
    judged = {row[0]: row[-1] for row in table[1:] if row[-1]}
    reading = " ".join(f"{side}: {result}." for side, result in judged.items())
    count = len(next(iter(results.values())))
    write_record(
        "quality", QUESTION, f"python benchmarks/quality.py --windows {count}",
        {"model": "SmolLM2-135M-Instruct", "windows": count, "tokens": WINDOW,
         "scored": WINDOW - SCORED_FROM},
        {"losses": results, "change_percent": changes}, table, reading,
    )  # fmt: skip


def _result(side: str, results: dict[str, Losses], changes: dict[str, float]) -> str:
    peer = dict(TARGETS).get(side)
    if peer not in results:
        return ""
    percent, error = change(results[side], results[peer])
    parts = [f"{percent:+.2f} ± {error:.2f} % beside {peer}, at most 0: {_met(percent <= 0)}"]
    if side == "ours wint8":
        met = _met(changes[side] <= WINT8_PERCENT)
        parts.append(f"at most +{WINT8_PERCENT} %: {met}")
    return "; ".join(parts)


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), args.windows))


if __name__ == "__main__":
    main()
