"""The flags of a command: one for every field of its config classes, and those that are refused.

Spellings, arity, help and the table in docs/serving.md are made from the fields and from
`UNSUPPORTED`; there is no other list. Dashes and underscores are the same, a list may be given in
several words, with commas or by repeating its flag, and a switch has a `--no-` form.

Imports no torch and no web library, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from ernie.settings import ConfigError, did_you_mean, field_types, fill, help_of, read_yaml
from fastdeploy.decoding import without_unsupported

# Variables that stand in for flags; a `--config` file wins over them, and a flag over both.
ENVIRONMENT = {
    "FD_API_KEY": "api_key",
    "FD_SERVICE_NAME": "service_name",
    "TRACES_ENABLE": "traces_enable",
    "TRACES_EXPORTER": "traces_exporter",
    "EXPORTER_OTLP_ENDPOINT": "exporter_otlp_endpoint",
    "EXPORTER_OTLP_HEADERS": "exporter_otlp_headers",
}

# Flags of FastDeploy and vLLM that have no counterpart, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "revision": ("master", None),
    "task": ("generate", "auto"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "override_pooler_config": (None,),
    "model_impl": ("auto", "fastdeploy"),
    "use_warmup": (0,),
    "lm_head_fp32": (False,),
    "max_encoder_cache": (-1, 0),
    "max_processor_cache": (-1, 0),
    "disable_chunked_mm_input": (False,),
    "enable_mm": (False, True),  # what a model reads is in its folder
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
    "tokenizer_base_url": (None,),
    "enable_mm_output": (False,),
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (False,),
    "load_format": ("auto", "safetensors"),
    "download_dir": (None,),
    "pipeline_parallel_size": (1,),
    "distributed_executor_backend": (None, "mp"),
    "cpu_offload_gb": (0,),
    "scheduling_policy": ("priority", "fcfs"),
    "disable_log_stats": (False,),
    "max_log_len": (None,),
    "root_path": (None,),
    "ssl_keyfile": (None,),
    "ssl_certfile": (None,),
    "allow_credentials": (False,),
    "enable_request_id_headers": (True, False),
    "enable_prompt_tokens_details": (True, False),
    "disable_fastapi_docs": (True,),
    "response_role": ("assistant",),
    "chat_template_content_format": ("auto",),
}
SHORT = {"dp": "data_parallel_size", "pp": "pipeline_parallel_size"}

_ONE_HOST = "asks for several machines; start a server on each and put a balancer in front"
_TLS = "is not offered: a proxy with TLS in front does it (see docs/serving.md)"
_MODEL_CODE = "is refused: no code from a model's folder or from a plug-in is ever run"
REASONS = {
    "workers": "is not offered: HTTP takes one process, and the engine has one of its own",
    "metrics_port": "is not offered: /metrics is on the port of the API, behind the same keys",
    "controller_port": "is not offered: the routes of enable_control_api do it, behind the keys",
    "swap_space": "is not offered: the cache has no tier in the host's memory",
    "kvcache_storage_backend": "is not offered: the cache has no tier outside of memory",
    "enable_mm_output": "is not available: the models answer in text",
    "trust_remote_code": _MODEL_CODE,
    "tool_parser_plugin": _MODEL_CODE,
    "logits_processors": _MODEL_CODE,
    "load_format": "is refused: weights are read from safetensors alone",
    "ssl_keyfile": _TLS,
    "ssl_certfile": _TLS,
    "root_path": "is not offered: have the proxy take the prefix off",
    "allow_credentials": "is refused: keys travel in a header, never in a cookie",
    "ips": _ONE_HOST,
    "data_parallel_size": _ONE_HOST,
    "pipeline_parallel_size": "is not offered: tensor_parallel_size shares the layers' work",
    "max_log_len": "is not needed: prompts are never logged",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A field as a flag. `arity` is switch, value or list."""

    name: str
    arity: str
    group: str
    help: str
    default: Any  # dataclasses.MISSING where one has to be given
    choices: tuple[Any, ...]
    aliases: tuple[str, ...]

    @property
    def long(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        if self.default is dataclasses.MISSING:
            return "required"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return "none" if self.default is None else str(self.default)

    @property
    def spellings(self) -> list[str]:
        """As it is written, with its value, and then its other names."""
        value = self.name.upper().rsplit("_", 1)[-1]
        value = "|".join(map(str, self.choices)) or value
        value = {"switch": "", "value": f" {value}", "list": f" {value} ..."}[self.arity]
        long = self.long.replace("--", "--[no-]", 1) if self.arity == "switch" else self.long
        return [long + value, *map(_dashed, self.aliases)]


def _dashed(alias: str) -> str:
    word = alias.lstrip("!").replace("_", "-")
    return f"-{word}" if len(word) <= 2 else f"--{word}" + " (off)" * alias.startswith("!")


def flags_of(kinds: Sequence[type]) -> list[Flag]:
    """The flags of config classes, in their order."""
    flags = []
    for kind in kinds:
        hints, group = field_types(kind), ""
        for field in dataclasses.fields(kind):
            group = field.metadata.get("group") or group
            flags.append(
                Flag(
                    field.name,
                    _arity(hints[field.name]),
                    group,
                    help_of(field),
                    field.default,
                    field.metadata.get("choices", ()),
                    field.metadata.get("aliases", ()),
                )
            )
    return flags


def _arity(hint: Any) -> str:
    kinds = {get_origin(part) or part for part in (hint, *get_args(hint))}
    return "list" if list in kinds else "switch" if bool in kinds else "value"


def read_config(kinds: list[type], values: Mapping[str, Any], origin: str) -> list[Any]:
    """Instances of `kinds` from flat values; see `UNSUPPORTED` for what is refused.

    Raises ConfigError.
    """
    return fill(kinds, without_unsupported(values, UNSUPPORTED, origin, REASONS), origin)


def read_flags(
    words: Sequence[str], kinds: Sequence[type], environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Flat values: the environment, then a `--config` file, then flags, later ones winning.

    A word without a flag is the model. Raises ConfigError for a flag that is unknown, given twice
    or without its value.
    """
    reader = _Reader(flags_of(kinds))
    given = reader.read(words)
    values: dict[str, Any] = {
        name: environment[key] for key, name in ENVIRONMENT.items() if environment.get(key)
    }
    if "config" in given:
        path = given.pop("config")
        for key, said in read_yaml(path).items():
            name, inverted = reader.resolve(str(key), path)
            values[name] = _opposite(said, key) if inverted else said
    return values | given


class _Reader:
    def __init__(self, flags: Sequence[Flag]) -> None:
        self.arity = {"config": "value"} | {flag.name: flag.arity for flag in flags}
        for name, neutral in UNSUPPORTED.items():
            self.arity[name] = "switch" if isinstance(neutral[0], bool) else "value"
        self.spellings = {name: (name, False) for name in self.arity}
        for name, arity in self.arity.items():
            if arity == "switch":
                self.spellings["no_" + name] = (name, True)
        for flag in flags:
            for alias in flag.aliases:
                self.spellings[alias.lstrip("!")] = (flag.name, alias.startswith("!"))
        self.spellings |= {short: (name, False) for short, name in SHORT.items()}

    def resolve(self, word: str, origin: str) -> tuple[str, bool]:
        """The field that a spelling means, and whether it means its opposite."""
        key = word.lstrip("-").replace("-", "_")
        if key not in self.spellings:
            near = did_you_mean(key, self.spellings)
            if word.startswith("-"):
                near = near.replace("_", "-").replace("'", "'--", 1)
                raise ConfigError(f"unknown flag {word!r}{near}")
            raise ConfigError(f"unknown key {word!r} in {origin}{near}")
        return self.spellings[key]

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        rest = list(words)
        while rest:
            word, equals, value = rest.pop(0).partition("=")
            if not word.startswith("-"):
                word, equals, value = "--model", "=", word + equals + value
            name, inverted = self.resolve(word, "the flags")
            if name in values and self.arity[name] != "list":
                raise ConfigError(f"--{name.replace('_', '-')} is given twice; give it once")
            if self.arity[name] == "switch":
                said = value if equals else _next_truth(rest)
                values[name] = _opposite(said, word) if inverted else said
            elif self.arity[name] == "list":
                items = [value] if equals else _until_flag(rest)
                values[name] = values.get(name, []) + _items(items, word)
            else:
                if not equals and (not rest or rest[0].startswith("--")):
                    raise ConfigError(f"{word} has no value; write {word} VALUE")
                values[name] = value if equals else rest.pop(0)
        return values


def _next_truth(rest: list[str]) -> str | bool:
    return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else True


def _opposite(value: Any, word: str) -> bool:
    said = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if said is None:
        raise ConfigError(f"{word}={value!r} is neither true nor false; give one of them")
    return not said


def _until_flag(rest: list[str]) -> list[str]:
    taken = []
    while rest and not rest[0].startswith("-"):
        taken.append(rest.pop(0))
    return taken


def _items(words: Sequence[str], flag: str) -> list[str]:
    """Several words, commas, or (as vLLM has it) a JSON list."""
    if not words:
        raise ConfigError(f"{flag} has no value; write {flag} VALUE ...")
    if len(words) == 1 and words[0].startswith("["):
        try:
            return [str(item) for item in json.loads(words[0])]
        except ValueError as error:
            raise ConfigError(f"{flag} is no JSON list: {error}") from None
    return [item.strip() for word in words for item in word.split(",")]


def help_text(usage: str, about: str, kinds: Sequence[type]) -> str:
    """What `--help` says: the flags under their groups' headings, each with its default."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, width)]
    group = None
    for flag in flags_of(kinds):
        if flag.group != group:
            group = flag.group
            lines += ["", f"{group}:"]
        lines += _help_lines(flag, width)
    variables = ", ".join(ENVIRONMENT)
    notes = (
        "Brackets hold the default. --config FILE reads the same names from YAML. Dashes and "
        f"underscores are the same. Read from the environment too: {variables}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(notes, width)]) + "\n"


def _help_lines(flag: Flag, width: int) -> Iterator[str]:
    yield "  " + ", ".join(flag.spellings)
    indent = " " * 6
    text = f"{flag.help} [{flag.default_text}]"
    yield from textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
