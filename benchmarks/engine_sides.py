"""The sides of `engine`: ours, transformers and llama.cpp behind one small interface.

A side answers prompts of token ids greedily and never stops early. It is built in a process of its
own, which imports nothing of the others: see `engine`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Prompt = list[int]


class Side(Protocol):
    def arrivals(self, prompt: Prompt, count: int) -> list[float]:
        """When each of `count` new tokens of one prompt was there, by `time.perf_counter`."""

    def answer_all(self, prompts: Sequence[Prompt], count: int) -> None:
        """`count` new tokens for each of several prompts of one length, at once."""

    def bytes_per_token(self, context: int) -> float:
        """Weights and cache read to decode one token after `context` others."""


class Ours:
    def __init__(self, folder: Path, quantization: str | None) -> None:
        from fastdeploy import LLM

        options: dict[str, Any] = {"quantization": quantization} if quantization else {}
        self.llm = LLM(
            str(folder), max_model_len=1024, max_num_seqs=16, enable_prefix_caching=False, **options
        )

    def _params(self, count: int):
        from fastdeploy import SamplingParams

        return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)

    def arrivals(self, prompt: Prompt, count: int) -> list[float]:
        pieces = self.llm.generate(prompt, self._params(count), use_tqdm=False, stream=True)
        return [time.perf_counter() for piece in pieces if piece][:count]

    def answer_all(self, prompts: Sequence[Prompt], count: int) -> None:
        self.llm.generate(list(prompts), self._params(count), use_tqdm=False)

    def bytes_per_token(self, context: int) -> float:
        from ernie.kernels import PackedWeight

        runner = self.llm.engine.runner
        model, config = runner.model, runner.model.config
        total = model.fused_head.weight.num_bytes
        held: list[object] = [value for m in model.modules() for value in vars(m).values()]
        for value in held:  # grows: a bank of experts is a tuple in a list
            if isinstance(value, (list, tuple)):
                held += value
            elif isinstance(value, PackedWeight):
                is_stack = len(value.shape) == 3
                total += value.num_bytes * (config.moe_k / value.shape[0] if is_stack else 1)
        element = runner.cache.keys_LBPGr.element_size()
        return total + context * config.kv_bytes_per_token(element)


class Transformers:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def _generate(self, batch: Sequence[Prompt], count: int, **options: Any) -> None:
        ids = self.torch.tensor(batch)
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip

    def arrivals(self, prompt: Prompt, count: int) -> list[float]:
        clock = _Clock()
        self._generate([prompt], count, streamer=clock)
        return clock.times[1:]  # the first thing that is streamed is the prompt

    def answer_all(self, prompts: Sequence[Prompt], count: int) -> None:
        self._generate(prompts, count)

    def bytes_per_token(self, context: int) -> float:
        from ernie.config import ErnieConfig

        config, size = ErnieConfig.from_folder(self.folder), self.dtype.itemsize
        return config.num_params(active=True) * size + context * config.kv_bytes_per_token(size)


class _Clock:
    """A streamer of transformers that notes when something came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaCppSide:
    def __init__(self, folder: Path, kind: str) -> None:
        from llama_cpp_peer import LlamaCpp

        self.path = folder.with_name(f"{folder.name}-{kind}.gguf")
        self.llama = LlamaCpp(self.path)
        self.reserved: tuple[int, int] = (0, 0)

    def _reserve(self, context: int, sequences: int = 1) -> None:
        if self.reserved != (context, sequences):
            self.llama.reserve(context, sequences)
            self.reserved = (context, sequences)

    def arrivals(self, prompt: Prompt, count: int) -> list[float]:
        self._reserve(1024)
        return [time.perf_counter() for _ in self.llama.generate(prompt, count)]

    def answer_all(self, prompts: Sequence[Prompt], count: int) -> None:
        self._reserve(256, len(prompts))
        self.llama.generate_batch(prompts, count)

    def bytes_per_token(self, context: int) -> float:
        from gguf import GGUFReader

        reader = GGUFReader(self.path)
        said = {name: field for name, field in reader.fields.items() if "expert" in name}
        counts = {name.split(".", 1)[1]: int(field.contents()) for name, field in said.items()}
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        total = 0.0
        for tensor in reader.tensors:
            if re.search(r"ffn_\w+_exps", tensor.name):
                total += tensor.n_bytes * counts["expert_used_count"] / counts["expert_count"]
            elif tensor.name != "token_embd.weight" or tied:
                total += int(tensor.n_bytes)
        arch = reader.fields["general.architecture"].contents()

        def size(key: str) -> int:
            return int(reader.fields[f"{arch}.{key}"].contents())

        width = size("attention.head_count_kv") * size("attention.key_length")
        return total + context * 2 * size("block_count") * width * 2  # the cache is float16
