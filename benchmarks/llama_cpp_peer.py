"""llama.cpp through the low-level functions of llama-cpp-python: the peer of two benchmarks.

Prompts and answers are token ids, greedy, several sequences in one batch. Its settings are its own
defaults, as many threads as cores, and of two choices the faster one: flash attention (on) and, for
several sequences, a stream of the cache for each (not one buffer for all). It repacks weights as it
likes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"

# (token, position, sequence, whether its logits are wanted)
Entry = tuple[int, int, int, bool]


def library():
    """The module llama_cpp, silenced."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise SystemExit(f"the package llama_cpp is missing; {INSTALL}") from None
    if not hasattr(library, "quiet"):
        library.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(library.quiet, None)
        llama_cpp.llama_backend_init()
    return llama_cpp


def system_info() -> str:
    """Version and the instruction sets that the library was compiled for."""
    llama_cpp = library()
    words = llama_cpp.llama_print_system_info().decode().split("|")
    used = [word.split("=")[0].split(":")[-1].strip() for word in words if "= 1" in word]
    return f"llama-cpp-python {llama_cpp.__version__}: {' '.join(used)}"


def quantized(source: Path, target: Path, kind: str) -> Path:
    """A Q8_0 or Q4_0 file made from an F16 one by llama.cpp, which chooses the type of the head."""
    llama_cpp = library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = num_threads()
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind}")
    return target


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


class LlamaCpp:
    """A GGUF file in llama.cpp; `reserve` it a cache before use."""

    def __init__(self, path: Path) -> None:
        self.lib = llama_cpp = library()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.context = None

    def reserve(self, context: int, sequences: int = 1) -> None:
        """Make room for `sequences` of `context` tokens each, in place of what was there."""
        if self.context is not None:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = context * sequences, sequences, False
        params.n_batch, params.n_ubatch = context * sequences, 512
        params.n_threads = params.n_threads_batch = num_threads()
        self.context = self.lib.llama_init_from_model(self.model, params)
        self.batch = self.lib.llama_batch_init(params.n_batch, 0, 1)

    def decode(self, entries: Sequence[Entry]) -> None:
        """Compute these tokens; those of a sequence follow each other."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode gave {status}"

    def logits(self, index: int) -> np.ndarray:
        """Logits `(V,)` of the batch's entry `index`, valid until the next `decode`."""
        pointer = self.lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def generate(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """`count` greedy tokens after one prompt."""
        self.clear()
        last = len(prompt) - 1
        self.decode([(token, i, 0, i == last) for i, token in enumerate(prompt)])
        token = int(self.logits(last).argmax())
        yield token
        for position in range(len(prompt), len(prompt) + count - 1):
            self.decode([(token, position, 0, True)])
            token = int(self.logits(0).argmax())
            yield token

    def generate_batch(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` greedy tokens after each of several prompts of one length, all at once."""
        self.clear()
        length = len(prompts[0])
        self.decode(
            [
                (token, i, sequence, i == length - 1)
                for sequence, prompt in enumerate(prompts)
                for i, token in enumerate(prompt)
            ]
        )
        ends = range(length - 1, length * len(prompts), length)
        answers = [[int(self.logits(end).argmax())] for end in ends]
        for position in range(length, length + count - 1):
            self.decode([(answer[-1], position, i, True) for i, answer in enumerate(answers)])
            for i, answer in enumerate(answers):
                answer.append(int(self.logits(i).argmax()))
        return answers
