"""Settings of the engine and of the server: one dataclass each, from which flags and help are made.

Names and defaults are FastDeploy's; where a default differs its help says so by being what it is.
Flags of FastDeploy whose feature does not exist here yet are known: their default is accepted, any
other value is refused in a sentence. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie.settings import ConfigError, fill, option, required


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The model and how it is run."""

    model: str = required("Folder of the model, or its name on the hub.")
    tokenizer: str | None = option(None, "Folder of the tokenizer, if not the model's own.")
    chat_template: str | None = option(None, "Chat template: Jinja text, or the path of a file.")
    dtype: str = option(
        "bfloat16", "Type of the weights in memory.", choices=("bfloat16", "float32")
    )
    quantization: str | None = option(
        None,
        "Form of weights: wint8, wint4 (experts 4 bits, the rest 8; dense models 4), wint4_all, "
        "or the published JSON object.",
    )
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one.")
    seed: int = option(0, "Origin of the seeds of requests that give none.")
    max_model_len: int = option(2048, "Tokens of a text at most, prompt and answer together.")
    max_num_seqs: int = option(8, "Texts that are worked on at the same time.")
    max_num_batched_tokens: int | None = option(
        None, "Tokens of one step at most; none: 512 on a CPU, 8192 on a GPU."
    )
    block_size: int = option(64, "Positions of one block of the key/value cache.")
    gpu_memory_utilization: float = option(
        0.9, "Share of the free memory (of the GPU, or of the host) that the cache may take."
    )
    num_gpu_blocks_override: int | None = option(
        None, "Blocks of the cache; none: by memory, at most what max_num_seqs texts can fill."
    )
    enable_prefix_caching: bool = option(True, "Reuse the cache of texts that begin alike.")
    enable_chunked_prefill: bool = option(True, "Read long prompts in pieces, between other texts.")
    use_cudagraph: bool | None = option(
        None, "Replay decode steps as recorded CUDA graphs; none: on a GPU yes, on a CPU no."
    )
    enable_logprob: bool = option(False, "Allow requests to ask for log-probabilities.")
    max_logprobs: int = option(20, "Likeliest tokens a request may ask for; -1: no limit.")

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "block_size",
            "max_num_batched_tokens",
            "num_gpu_blocks_override",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small; it takes 1 or more")
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is too small; it takes 2 or more"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not a share; it takes "
                "more than 0 and at most 1"
            )
        if self.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs={self.max_logprobs}; it takes -1 (no limit), 0 or more"
            )

    def resolved(self, *, max_positions: int, device_type: str) -> EngineConfig:
        """With the values that depend on model and device filled in; raises ConfigError if they
        contradict each other.
        """
        if self.max_model_len > max_positions:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is more than the {max_positions} positions "
                f"the model was made for; use {max_positions} or less"
            )
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = max(512 if device_type == "cpu" else 8192, self.max_num_seqs)
            tokens = tokens if self.enable_chunked_prefill else max(tokens, self.max_model_len)
        if tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "each text needs one token of a step; raise the first or lower the second"
            )
        if not self.enable_chunked_prefill and tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill max_num_batched_tokens={tokens} must hold a "
                f"whole prompt; use max_model_len={self.max_model_len} or more"
            )
        graphs = self.use_cudagraph
        if graphs and device_type != "cuda":
            raise ConfigError(f"use_cudagraph needs a GPU, this is {device_type}; leave it out")
        graphs = device_type == "cuda" if graphs is None else graphs
        return dataclasses.replace(self, max_num_batched_tokens=tokens, use_cudagraph=graphs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on; other than loopback needs an api_key.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: str | None = option(
        None, "Name of the model in requests, checked if given; none: its folder's, any accepted."
    )
    api_key: list[str] | None = option(  # noqa: RUF009
        None, "Bearer keys that are let in, separated by commas."
    )
    max_concurrency: int = option(512, "Requests in work or in the queue at the same time.")
    max_body_mib: int = option(32, "Size of a request body at most, in MiB.")
    timeout_graceful_shutdown: int = option(
        0, "Seconds that running requests get to finish when the server is told to stop."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is not a port; it takes 0 to 65535")
        for name in ("max_concurrency", "max_body_mib"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; it takes 1 or more")
        if self.timeout_graceful_shutdown < 0:
            raise ConfigError("timeout_graceful_shutdown is negative; it takes 0 or more seconds")
        if self.api_key is not None and not all(self.api_key):
            raise ConfigError("api_key is empty; give a key, or leave it out")
        if not self.is_loopback and not self.api_key:
            raise ConfigError(
                f"host={self.host} lets other machines in; give an api_key, or use 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


# FastDeploy's flags that have no counterpart yet, with the values that ask for nothing.
LATER: dict[str, tuple[Any, ...]] = {
    "revision": ("master", None),
    "task": ("generate", "auto"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "override_pooler_config": (None,),
    "model_impl": ("auto", "fastdeploy"),
    "use_warmup": (0,),
    "lm_head_fp32": (False,),
    "limit_mm_per_prompt": (None,),
    "mm_processor_kwargs": (None,),
    "max_encoder_cache": (-1, 0),
    "max_processor_cache": (-1, 0),
    "disable_chunked_mm_input": (False,),
    "enable_mm": (False,),
    "reasoning_parser": (None,),
    "tool_call_parser": (None,),
    "tool_parser_plugin": (None,),
    "logprobs_mode": ("raw_logprobs",),
    "enable_keep_sampling_mask": (False,),
    "enable_entropy": (False,),
    "guided_decoding_backend": ("off",),
    "guided_decoding_disable_any_whitespace": (False,),
    "logits_processors": (None,),
    "enable_early_stop": (False,),
    "early_stop_config": (None,),
    "load_choices": ("default_v1", "default"),
    "dynamic_load_weight": (False,),
    "load_strategy": ("normal",),
    "rsync_config": (None,),
    "tensor_parallel_size": (1,),
    "data_parallel_size": (1,),
    "local_data_parallel_id": (0,),
    "enable_expert_parallel": (False,),
    "enable_eplb": (False,),
    "eplb_config": (None,),
    "ips": (None,),
    "kv_cache_ratio": (0.75, 1.0),
    "swap_space": (None, 0),
    "kvcache_storage_backend": (None,),
    "enable_output_caching": (True,),
    "max_num_partial_prefills": (1,),
    "max_long_partial_prefills": (1,),
    "long_prefill_token_threshold": (0,),
    "graph_optimization_config": (None,),
    "plas_attention_config": (None,),
    "speculative_config": (None,),
    "splitwise_role": ("mixed",),
    "router": (None,),
    "scheduler_name": ("local",),
    "enable_overlap_schedule": (False,),
    "benchmark_metrics_config": (None,),
    "workers": (1,),
    "metrics_port": (None,),
    "controller_port": (-1,),
    "max_waiting_time": (-1,),
    "timeout": (0,),
    "tokenizer_base_url": (None,),
    "enable_mm_output": (False,),
}


def read_config(kinds: list[type], values: Mapping[str, Any], origin: str) -> list[Any]:
    """Instances of `kinds` from flat values; see `LATER` for what is refused.

    Raises ConfigError.
    """
    kept = {}
    for key, value in values.items():
        if key not in LATER:
            kept[key] = value
        elif not _asks_for_nothing(value, LATER[key]):
            raise ConfigError(
                f"{key}={value!r} in {origin} asks for something that is not available yet; "
                f"leave it out or use {LATER[key][0]!r}"
            )
    return fill(kinds, kept, origin)


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value in neutral or str(value).lower() in {str(v).lower() for v in neutral}
