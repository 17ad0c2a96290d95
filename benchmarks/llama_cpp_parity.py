"""Does the imported SmolLM2 say, token for token, what llama.cpp says on the same GGUF file?

    python benchmarks/llama_cpp_parity.py

Greedy, 64 tokens for each prompt. llama.cpp multiplies Q4_1 weights with activations that it rounds
to 8 bits, ours computes with float32 activations; so a second file is compared too, the same
weights written as float32, where llama.cpp rounds no activations. Where the two part, the table
shows how far apart our logits of the two candidates are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import smollm2_gguf, write_record

QUESTION = __doc__.splitlines()[0]
NUM_TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List three uses of a paper clip.",
    "What does Python's `hex` do?",
    "Translate to Spanish: good morning, my friend.",
    "Why is the sky blue?",
    "Tell me a story about a dog named Max.",
)


def write_float32(source: Path, target: Path) -> None:
    """The same model with every tensor dequantised to float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name in own or name.startswith("GGUF."):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        kind = field.types[-1] if array else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in tensor.shape[::-1]]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path: Path, prompts: list[list[int]]) -> Iterator[list[int]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    server = xllamacpp.Server(params)
    for prompt in prompts:
        request = {
            "prompt": prompt,
            "n_predict": NUM_TOKENS,
            "temperature": 0.0,
            "logprobs": 1,  # which brings the token ids along
            "cache_prompt": False,
        }
        (choice,) = server.handle_completions(request)["choices"]
        yield [token["id"] for token in choice["logprobs"]["content"]]


def main() -> None:
    import ernie
    from ernie.chat import ChatTemplate
    from ernie.checkpoint.gguf import import_gguf
    from ernie.generate import generate

    source = smollm2_gguf()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_gguf(source, folder / "model", dtype="float32")
        model = ernie.load(folder / "model", dtype=None)
        template = ChatTemplate.for_folder(folder / "model")
        assert model.tokenizer is not None
        prompts = [
            template.encode(model.tokenizer, [{"role": "user", "content": text}]).token_ids
            for text in PROMPTS
        ]
        stops = model.config.eos_token_ids
        ours = [list(generate(model, p, max_tokens=NUM_TOKENS, stop_ids=stops)) for p in prompts]
        write_float32(source, folder / "float32.gguf")
        theirs = {
            "Q4_1 (activations rounded to 8 bits)": list(llama_cpp(source, prompts)),
            "float32": list(llama_cpp(folder / "float32.gguf", prompts)),
        }
    table = [["llama.cpp on", "answers equal", "tokens equal before the first difference", "gaps"]]
    results = {}
    for name, answers in theirs.items():
        rows = [compared(model, *row) for row in zip(prompts, ours, answers)]
        num_equal = sum(gap is None for _, _, gap in rows)
        same, total = sum(r[0] for r in rows), sum(r[1] for r in rows)
        gaps = [round(gap, 3) for _, _, gap in rows if gap is not None]
        results[name] = {"equal_answers": num_equal, "same": same, "total": total, "gaps": gaps}
        words = ", ".join(map(str, gaps)) or "none"
        table.append([name, f"{num_equal} of {len(rows)}", f"{same} of {total}", words])
    q4, f32 = results.values()
    reading = (
        f"On float32 weights {f32['equal_answers']} of {len(PROMPTS)} answers are equal token for "
        f"token, on the Q4_1 file {q4['equal_answers']}: what differs comes from llama.cpp's 8-bit "
        "activations, at places where our two best candidates are close."
    )
    write_record(
        "llama_cpp_parity", QUESTION, "python benchmarks/llama_cpp_parity.py",
        {"prompts": len(PROMPTS), "tokens": NUM_TOKENS}, results, table, reading,
    )  # fmt: skip


def compared(
    model, prompt: list[int], ours: list[int], theirs: list[int]
) -> tuple[int, int, float | None]:
    """Equal tokens, tokens, and our logit gap of the two candidates where they part (or None)."""
    if theirs and len(theirs) < len(ours) and ours[: len(theirs)] == theirs:
        theirs = [
            *theirs,
            ours[len(theirs)],
        ]  # llama.cpp does not return the token that ends a turn
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            logits = model.logits([*prompt, *ours[:i]])[-1]
            return i, len(ours), float(logits[a] - logits[b])
    return len(ours), len(ours), None


if __name__ == "__main__":
    main()
