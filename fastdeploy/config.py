"""Settings of the engine and of the server: one dataclass each, from which flags and help are made.

Names and defaults are FastDeploy's; where a default differs its help says so by being what it is.
Flags of FastDeploy whose feature does not exist here yet are known: their default is accepted, any
other value is refused in a sentence. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie.settings import ConfigError, fill, option, required


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStop:
    """When a text that repeats itself is ended.

    A model that runs in circles is sure of every next token: a text ends once `window_size` tokens
    in a row had, in the raw logits, a probability of more than `threshold`.
    """

    enable_early_stop: bool = option(True, "False keeps the other values and does nothing.")
    strategy: str = option("repetition", "What is looked for.", choices=("repetition",))
    window_size: int = option(3000, "Tokens in a row that the model has to be sure of.")
    threshold: float = option(0.99, "The probability above which it is.")

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ConfigError(f"window_size={self.window_size} is too small; it takes 1 or more")
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"threshold={self.threshold} is not a probability between 0 and 1; try 0.99"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """How the next tokens of a text are guessed, to be verified in one step."""

    method: str = required("ngram: what followed earlier in the text; mtp: the model's MTP block.")
    num_speculative_tokens: int = option(1, "Tokens that are guessed ahead, 1 to 5.")
    max_ngram_size: int = option(5, "Newest tokens that are looked for in the text, at most.")
    min_ngram_size: int = option(2, "Newest tokens that are looked for in the text, at least.")

    def __post_init__(self) -> None:
        if self.method not in ("ngram", "mtp"):
            raise ConfigError(
                f"method={self.method!r} in speculative_config is not available; use ngram or mtp"
            )
        if not 1 <= self.num_speculative_tokens <= 5:
            raise ConfigError(
                f"num_speculative_tokens={self.num_speculative_tokens} in speculative_config is "
                "out of range; it takes 1 to 5"
            )
        if not 1 <= self.min_ngram_size <= self.max_ngram_size:
            raise ConfigError(
                f"min_ngram_size={self.min_ngram_size} and max_ngram_size={self.max_ngram_size} in "
                "speculative_config fit no n-gram; they take 1 <= min_ngram_size <= max_ngram_size"
            )


# Other keys of FastDeploy's speculative_config, with the values that ask for nothing.
LATER_SPECULATION: dict[str, tuple[Any, ...]] = {
    "mtp_strategy": ("default",),
    "num_model_steps": (None,),
    "model": (None,),
    "quantization": (None,),
    "max_candidate_len": (None,),
    "verify_window": (None,),
    "verify_strategy": ("target_match",),
    "accept_policy": ("normal",),
    "suffix_decoding_max_tree_depth": (None,),
    "suffix_decoding_max_cached_requests": (None,),
    "suffix_decoding_max_spec_factor": (None,),
    "suffix_decoding_min_token_prob": (None,),
    "benchmark_mode": (False,),
    "enf_gen_phase_tag": (False,),
    "enable_draft_logprob": (False,),
}


def read_speculation(values: Mapping[str, Any]) -> Speculation:
    """The keys of a `speculative_config`, checked. Raises ConfigError."""
    values = _without_later(values, LATER_SPECULATION, "speculative_config")
    if values.get("method") == "ngram_match":  # the name in some of FastDeploy's versions
        values["method"] = "ngram"
    return fill([Speculation], values, "speculative_config")[0]


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
    tensor_parallel_size: int = option(
        1, "Processes that share the work of every layer; on GPUs each takes one."
    )
    block_size: int = option(64, "Positions of one block of the key/value cache.")
    gpu_memory_utilization: float = option(
        0.9, "Share of the free memory (of the GPU, or of the host) that the cache may take."
    )
    num_gpu_blocks_override: int | None = option(
        None, "Blocks of the cache; none: by memory, at most what max_num_seqs texts can fill."
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of the key/value cache; auto: float32 beside float32 weights, else bfloat16 on a GPU "
        "and float16 on a CPU, with an eighth of bfloat16's error in the logits.",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )
    batch_invariant: bool = option(
        False, "Give a text the same tokens, to the bit, whatever else is computed beside it."
    )
    enable_prefix_caching: bool = option(True, "Reuse the cache of texts that begin alike.")
    enable_chunked_prefill: bool = option(True, "Read long prompts in pieces, between other texts.")
    use_cudagraph: bool | None = option(
        None, "Replay decode steps as recorded CUDA graphs; none: wherever there is one GPU."
    )
    enable_logprob: bool = option(False, "Allow requests to ask for log-probabilities.")
    max_logprobs: int = option(20, "Likeliest tokens a request may ask for; -1: no limit.")
    think_stop_sentence: str | None = option(
        None, "Text that ends a thought whose budget is used up; none: the closing tag alone."
    )
    guided_decoding_backend: str = option(
        "auto",
        "What holds answers to a form: llguidance, off, or auto: llguidance where it is installed; "
        "xgrammar is accepted and served by llguidance, in the same forms.",
        choices=("auto", "llguidance", "xgrammar", "off"),
    )
    guided_decoding_disable_any_whitespace: bool = option(
        False, "Write constrained JSON without a space or line break between its parts."
    )
    guided_decoding_max_bytes: int = option(
        65536, "Size of a schema, regular expression or grammar at most, in bytes."
    )
    enable_early_stop: bool = option(False, "End texts that repeat themselves.")
    early_stop_config: dict | str | None = option(  # noqa: RUF009
        None, "When they end, as JSON: strategy, window_size, threshold; given, it enables them."
    )
    speculative_config: dict | None = option(  # noqa: RUF009
        None, 'Drafts, in JSON: {"method": "ngram", "num_speculative_tokens": 4}; or "mtp".'
    )
    enable_lora: bool = option(False, "Load LoRA adapters, also while others are being served.")
    max_loras: int = option(8, "Adapters in memory at the same time.")
    max_lora_rank: int = option(64, "Rank of an adapter at most.")

    def __post_init__(self) -> None:
        _ = self.speculation  # whose own checks speak
        self._check_ranks()
        if self.batch_invariant and self.enable_lora:
            raise ConfigError(
                "batch_invariant with enable_lora is not available: a text beside one with an "
                "adapter is computed in another order; leave out one of the two"
            )
        for name in (
            "max_num_seqs",
            "block_size",
            "tensor_parallel_size",
            "max_num_batched_tokens",
            "num_gpu_blocks_override",
            "max_loras",
            "max_lora_rank",
            "guided_decoding_max_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small; it takes 1 or more")
        if self.tensor_parallel_size > 1 and (self.enable_lora or self.has_mtp):
            what = "enable_lora" if self.enable_lora else "speculation by mtp"
            raise ConfigError(
                f"{what} with tensor_parallel_size={self.tensor_parallel_size} is not available; "
                "use tensor_parallel_size=1"
            )
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
        self.early_stop()  # refuses what is wrong with it

    def _check_ranks(self) -> None:
        if self.tensor_parallel_size > 1 and self.enable_lora:
            raise ConfigError(
                f"enable_lora with tensor_parallel_size={self.tensor_parallel_size} is not "
                "available; use tensor_parallel_size=1, or merge the adapter into the model"
            )
        if self.tensor_parallel_size > 1 and self.has_mtp:
            raise ConfigError(
                "the method mtp of speculative_config is not available with "
                f"tensor_parallel_size={self.tensor_parallel_size}; use ngram, or one process"
            )

    def early_stop(self) -> EarlyStop | None:
        """When texts end that repeat themselves, None for never. Raises ConfigError."""
        values = self.early_stop_config
        if values is None:
            return EarlyStop() if self.enable_early_stop else None
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except ValueError as error:
                raise ConfigError(f"early_stop_config is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"early_stop_config is a {type(values).__name__}; it takes a JSON object"
            )
        (found,) = fill([EarlyStop], values, "early_stop_config")
        if self.enable_early_stop and not found.enable_early_stop:
            raise ConfigError(
                "enable_early_stop is set, and early_stop_config says enable_early_stop=false; "
                "leave out one of the two"
            )
        return found if found.enable_early_stop else None

    @property
    def speculation(self) -> Speculation | None:
        """`speculative_config`, read; None when nothing is drafted."""
        if self.speculative_config is None:
            return None
        return read_speculation(self.speculative_config)

    @property
    def has_mtp(self) -> bool:
        """Whether the model's MTP block runs."""
        return self.speculation is not None and self.speculation.method == "mtp"

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
        can_record = device_type == "cuda" and self.tensor_parallel_size == 1
        if self.use_cudagraph and not can_record:
            raise ConfigError(
                f"use_cudagraph needs one GPU, this is {device_type} with tensor_parallel_size="
                f"{self.tensor_parallel_size}; leave it out"
            )
        graphs = can_record if self.use_cudagraph is None else self.use_cudagraph
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
    lora_modules: list[str] | None = option(  # noqa: RUF009
        None, "Adapters to load at the start, NAME=FOLDER, separated by commas."
    )
    lora_root: str | None = option(
        None, "Folder under which adapters may be loaded by HTTP; none: they may not."
    )
    max_concurrency: int = option(512, "Requests in work or in the queue at the same time.")
    max_body_mib: int = option(32, "Size of a request body at most, in MiB.")
    enable_control_api: bool = option(
        False, "Let clients pause the engine, put it to sleep and change its weights."
    )
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
    "logits_processors": (None,),
    "load_choices": ("default_v1", "default"),
    "dynamic_load_weight": (False,),
    "load_strategy": ("normal",),
    "rsync_config": (None,),
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
    return fill(kinds, _without_later(values, LATER, origin), origin)


def _without_later(
    values: Mapping[str, Any], later: Mapping[str, tuple[Any, ...]], origin: str
) -> dict[str, Any]:
    """`values` without the keys of `later`, whose values must be among those listed there."""
    kept = {}
    for key, value in values.items():
        if key not in later:
            kept[key] = value
        elif not _asks_for_nothing(value, later[key]):
            raise ConfigError(
                f"{key}={value!r} in {origin} asks for something that is not available yet; "
                f"leave it out or use {later[key][0]!r}"
            )
    return kept


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value in neutral or str(value).lower() in {str(v).lower() for v in neutral}
