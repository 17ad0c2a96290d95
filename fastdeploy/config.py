"""Settings of the engine and of the server: one dataclass each, from which flags and help are made.

Names and most defaults are FastDeploy's. Flags of features that do not exist here are in
`flags.UNSUPPORTED`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from ernie.settings import ConfigError, check_bounds, fill, option, required
from fastdeploy.decoding import EarlyStop, Speculation, read_speculation
from fastdeploy.server.parsers import find_syntax

USUAL_MODEL_LEN = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The model and how it is run."""

    model: str = required("Folder of the model, or its name on the hub.", group="Model", path=True)
    tokenizer: str | None = option(None, "Folder of the tokenizer, if not the model's own.")
    chat_template: str | None = option(
        None, "Chat template: Jinja text, or the path of a file.", path=True
    )
    ignore_training_template: bool = option(
        False,
        "Serve a model although its chat template or tokenizer is not the one that its "
        "training_template.json says it was trained with.",
    )
    dtype: str = option(
        "bfloat16", "Type of the weights in memory.", choices=("bfloat16", "float32")
    )
    quantization: str | None = option(
        None,
        "Form of weights: wint8, wint4 (experts 4 bits, the rest 8; dense models 4), wint4_all, "
        "or the published JSON object.",
        aliases=("q",),
    )
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one.")
    seed: int = option(0, "Origin of the seeds of requests that give none.")
    max_model_len: int = option(
        0,
        f"Tokens of a text at most, prompt and answer together; 0: {USUAL_MODEL_LEN}, or the "
        "model's positions where those are fewer.",
        group="Batch and memory",
    )
    max_num_seqs: int = option(8, "Texts that are worked on at the same time.", least=1)
    max_num_batched_tokens: int | None = option(
        None, "Tokens of one step at most; none: 512 on a CPU, 8192 on a GPU.", least=1
    )
    tensor_parallel_size: int = option(
        1,
        "Processes that share the work of every layer; on GPUs each takes one.",
        aliases=("tp",),
        least=1,
    )
    block_size: int = option(64, "Positions of one block of the key/value cache.", least=1)
    gpu_memory_utilization: float = option(
        0.9, "Share of the free memory (of the GPU, or of the host) that the cache may take."
    )
    num_gpu_blocks_override: int | None = option(
        None,
        "Blocks of the cache; none: by memory, at most what max_num_seqs texts can fill.",
        least=1,
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
    vision_cache_mib: int = option(
        1024,
        "Memory for pictures that were read, kept for requests with the same ones, in MiB.",
        least=1,
    )
    enable_chunked_prefill: bool = option(True, "Read long prompts in pieces, between other texts.")
    use_cudagraph: bool | None = option(
        None,
        "Replay decode steps as recorded CUDA graphs; none: on a GPU with tensor_parallel_size 1.",
        aliases=("!enforce_eager",),
    )
    enable_logprob: bool = option(
        False, "Allow requests to ask for log-probabilities.", group="Answers"
    )
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
        65536, "Size of a schema, regular expression or grammar at most, in bytes.", least=1
    )
    guided_decoding_max_stall_ms: int = option(
        250,
        "Milliseconds a constraint may take in a step; above that its answer ends with an error.",
        least=1,
    )
    enable_early_stop: bool = option(False, "End texts that repeat themselves.")
    early_stop_config: dict | str | None = option(  # noqa: RUF009
        None, "When they end, as JSON: strategy, window_size, threshold; given, it enables them."
    )
    speculative_config: dict | None = option(  # noqa: RUF009
        None,
        'Drafts, in JSON: {"method": "ngram", "num_speculative_tokens": 4}; method ngram or mtp, '
        "1 to 5 tokens.",
    )
    enable_lora: bool = option(
        False, "Load LoRA adapters, also while others are being served.", group="Adapters"
    )
    max_loras: int = option(8, "Adapters in memory at the same time.", least=1)
    max_lora_rank: int = option(64, "Rank of an adapter at most.", least=1)

    def __post_init__(self) -> None:
        _ = self.speculation  # whose own checks speak
        if self.batch_invariant and self.enable_lora:
            raise ConfigError(
                "batch_invariant with enable_lora is not available: a text beside one with an "
                "adapter is computed in another order; leave out one of the two"
            )
        if self.batch_invariant and self.tensor_parallel_size > 2:
            raise ConfigError(
                f"batch_invariant with tensor_parallel_size={self.tensor_parallel_size} is not "
                "available: sums of more than two ranks are made in an order that depends on the "
                "size of a step; use 1 or 2"
            )
        check_bounds(self)
        if self.max_model_len < 2 and self.max_model_len != 0:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is too small; it takes 2 or more, or 0"
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

    def length_for(self, max_positions: int) -> int:
        """`max_model_len` for a model of so many positions. Raises ConfigError."""
        longest = self.max_model_len or min(USUAL_MODEL_LEN, max_positions)
        if longest > max_positions:
            raise ConfigError(
                f"max_model_len={longest} is more than the {max_positions} positions "
                f"the model was made for; use {max_positions} or less"
            )
        return longest

    def resolved(self, *, max_positions: int, device_type: str) -> EngineConfig:
        """With the values that depend on model and device filled in; raises ConfigError if they
        contradict each other.
        """
        longest = self.length_for(max_positions)
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = max(512 if device_type == "cpu" else 8192, self.max_num_seqs)
            tokens = tokens if self.enable_chunked_prefill else max(tokens, longest)
        if tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "each text needs one token of a step; raise the first or lower the second"
            )
        if not self.enable_chunked_prefill and tokens < longest:
            raise ConfigError(
                f"without chunked prefill max_num_batched_tokens={tokens} must hold a "
                f"whole prompt; use {longest} or more"
            )
        can_record = device_type == "cuda" and self.tensor_parallel_size == 1
        if self.use_cudagraph and not can_record:
            raise ConfigError(
                f"use_cudagraph needs one GPU, this is {device_type} with tensor_parallel_size="
                f"{self.tensor_parallel_size}; leave it out"
            )
        graphs = can_record if self.use_cudagraph is None else self.use_cudagraph
        return dataclasses.replace(
            self, max_model_len=longest, max_num_batched_tokens=tokens, use_cudagraph=graphs
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option(
        "127.0.0.1", "Address to listen on; other than loopback needs a key.", group="Server"
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: list[str] | None = option(  # noqa: RUF009
        None,
        "Names of the model in requests, checked if given or with enable_lora; none: its folder's.",
    )
    lora_modules: list[str] | None = option(  # noqa: RUF009
        None, "Adapters to load at the start, NAME=FOLDER."
    )
    lora_root: str | None = option(
        None, "Folder under which adapters may be loaded by HTTP; none: they may not."
    )
    reasoning_parser: str | None = option(
        "auto",
        "How thoughts are told from answers: ernie-45-vl, ernie-45-vl-thinking, ernie-x1, qwen3, "
        "none, or auto: by the tags of the chat template.",
    )
    tool_call_parser: str | None = option(
        "auto",
        "How tool calls are told from answers: ernie-45-vl-thinking, ernie-x1, hermes, none, or "
        "auto: by the tags of the chat template.",
    )
    trust_request_chat_template: bool = option(
        False, "Let requests bring a chat_template; its memory is not bounded."
    )
    enable_control_api: bool = option(
        False, "Let clients pause the engine, put it to sleep and change its weights."
    )
    web: bool = option(True, "Serve the chat page at `/`.")
    timeout_graceful_shutdown: int = option(
        0, "Seconds that running requests get to finish when the server is told to stop."
    )
    engine_step_timeout: int = option(
        120,
        "Seconds after which a step of the engine counts as stuck, and it is started again.",
        least=1,
    )
    api_key: list[str] | None = option(  # noqa: RUF009
        None, "Bearer keys that are let in; better in FD_API_KEY or a file.", group="Access"
    )
    api_key_file: str | None = option(
        None, "File with more keys, one a line; lines that begin with # are comments.", path=True
    )
    insecure_allow_no_key: bool = option(
        False, "Listen beyond loopback without a key: whoever reaches the port may use it."
    )
    allowed_hosts: list[str] | None = option(  # noqa: RUF009
        None, "Names by which a server without keys may be called, beside addresses and localhost."
    )
    allowed_origins: list[str] | None = option(  # noqa: RUF009
        None, "Origins whose web pages may call the server, such as https://example.com; or *."
    )
    max_concurrency: int = option(
        512,
        "Requests in work or in the queue at the same time; one more gets 429.",
        group="Limits",
        least=1,
    )
    max_concurrency_per_key: int | None = option(
        None, "Requests of one key at the same time; one more gets 429.", least=1
    )
    max_num_waiting: int | None = option(
        None,
        "Texts in the queue at which new requests get 429; none: max_concurrency alone.",
        least=1,
    )
    max_waiting_time: float = option(
        -1, "Seconds of waiting, by the measured rate, at which requests get 429; -1: any."
    )
    timeout: float = option(0, "Seconds that a request may take, its queue included; 0: any.")
    max_tokens_per_request: int | None = option(
        None, "Tokens that a request may ask for: its prompts x n x max_tokens.", least=1
    )
    max_body_mib: int = option(32, "Size of a request body at most, in MiB.", least=1)
    limit_mm_per_prompt: dict | None = option(  # noqa: RUF009
        None,
        'Pictures of a request at most, in JSON; default: {"image": 16, "video": 2}.',
        group="Pictures",
    )
    mm_processor_kwargs: dict | None = option(  # noqa: RUF009
        None,
        "Limits below those of the model, in JSON: image_max_pixels, video_max_frames, video_fps "
        "and the like; requests may ask for less.",
    )
    media_urls: bool = option(True, "Fetch pictures from http(s) URLs of requests.")
    allowed_media_domains: list[str] | None = option(  # noqa: RUF009
        None, "The only host names that these URLs may have; none: any with public addresses."
    )
    allowed_media_networks: list[str] | None = option(  # noqa: RUF009
        None, "Networks that they may reach although they are not public, such as 10.1.0.0/16."
    )
    allowed_local_media_path: str | None = option(
        None, "Folder below which requests may name files; none: they may name none.", path=True
    )
    media_fetch_timeout: float = option(20, "Seconds for one fetch, redirects and body included.")
    max_image_mib: int = option(32, "Size of an image file at most, in MiB.", least=1)
    max_video_mib: int = option(256, "Size of a clip's file at most, in MiB.", least=1)
    log_level: str = option(
        "info",
        "Least level of the log.",
        choices=("debug", "info", "warning", "error"),
        group="Logs and traces",
        aliases=("uvicorn_log_level",),
    )
    log_format: str = option(
        "text", "A line of text or a JSON object for each entry.", choices=("text", "json")
    )
    enable_log_requests: bool = option(
        False,
        "A line for each text that ends: its id, sizes and times, never what it says.",
        aliases=("log_requests", "!disable_log_requests"),
    )
    access_log: bool = option(
        False,
        "A line for each HTTP request.",
        aliases=("!disable_access_log", "!disable_uvicorn_access_log"),
    )
    traces_enable: bool = option(False, "Record OpenTelemetry spans; needs the extra otel.")
    traces_exporter: str = option(
        "console",
        "Where spans go: to standard output or to a collector.",
        choices=("console", "otlp"),
    )
    exporter_otlp_endpoint: str | None = option(
        None,
        "Address of the collector, such as http://127.0.0.1:4318/v1/traces.",
        aliases=("otlp_traces_endpoint",),
    )
    exporter_otlp_headers: str | None = option(
        None, "Headers for the collector, NAME=VALUE, separated by commas."
    )
    service_name: str = option("fastdeploy", "Name of this server in traces.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is not a port; it takes 0 to 65535")
        find_syntax(self.reasoning_parser, self.tool_call_parser, ())  # refuses unknown names
        check_bounds(self)
        for name in ("timeout_graceful_shutdown", "timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}; it takes 0 or more seconds")
        if self.max_waiting_time != -1 and not 0 <= self.max_waiting_time < float("inf"):
            raise ConfigError(
                f"max_waiting_time={self.max_waiting_time}; it takes -1 (any) or 0 or more seconds"
            )
        if self.served_model_name is not None and not all(self.served_model_name):
            raise ConfigError("served_model_name is empty; give a name, or leave it out")
        self.media_limits()  # refuses what is wrong with them
        self._check_media()
        self._check_access()
        self._check_traces()

    def media_limits(self) -> dict[str, int]:
        """Most pictures of a request, by kind. Raises ConfigError."""
        limits = {"image": 16, "video": 2}
        for kind, number in (self.limit_mm_per_prompt or {}).items():
            is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 0
            if kind not in limits or not is_count:
                raise ConfigError(
                    f"limit_mm_per_prompt has {kind!r}: {number!r}; it takes image and video, each "
                    "with a number of 0 or more"
                )
            limits[kind] = number
        return limits

    def _check_media(self) -> None:
        if not 0 < self.media_fetch_timeout < float("inf"):
            raise ConfigError(
                f"media_fetch_timeout={self.media_fetch_timeout}; it takes more than 0 seconds"
            )
        folder = self.allowed_local_media_path
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"allowed_local_media_path={folder} is no folder")
        for network in self.allowed_media_networks or ():
            try:
                ip_network(network)
            except ValueError as error:
                raise ConfigError(f"allowed_media_networks: {error}") from None

    def _check_access(self) -> None:
        for key in self.all_keys():
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    "a key is empty or has characters no header carries; use ASCII letters, "
                    "digits and marks"
                )
        if self.has_key and self.insecure_allow_no_key:
            raise ConfigError("insecure_allow_no_key is set, and there is a key; leave out one")
        if not (self.is_loopback or self.has_key or self.insecure_allow_no_key):
            raise ConfigError(
                f"host={self.host} lets other machines in; give an api_key (FD_API_KEY=..., "
                "--api-key-file FILE), or use 127.0.0.1"
            )
        if self.max_concurrency_per_key and not self.has_key:
            raise ConfigError("max_concurrency_per_key needs keys; give an api_key")
        for origin in self.allowed_origins or ():
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ConfigError(
                    f"allowed_origins has {origin!r}; write scheme://host[:port] without a path"
                )

    def _check_traces(self) -> None:
        is_otlp = self.traces_enable and self.traces_exporter == "otlp"
        if is_otlp and not self.exporter_otlp_endpoint:
            raise ConfigError("traces_exporter=otlp needs exporter_otlp_endpoint; give its address")
        if self.exporter_otlp_endpoint and not is_otlp:
            raise ConfigError(
                "exporter_otlp_endpoint needs traces_enable and traces_exporter=otlp; set both"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def has_key(self) -> bool:
        return bool(self.api_key or self.api_key_file)

    def all_keys(self) -> tuple[str, ...]:
        """The keys that are given and those in the file. Raises ConfigError."""
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"api_key_file={self.api_key_file} cannot be read: {error}"
                ) from None
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise ConfigError(f"api_key_file={self.api_key_file} has no key; write one a line")
            keys += found
        return tuple(keys)
