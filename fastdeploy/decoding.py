"""Two settings of the engine that are JSON objects: when texts end early, and how they are drafted.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ernie.settings import ConfigError, check_bounds, fill, option, required


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStop:
    """When a text that repeats itself is ended.

    A model that runs in circles is sure of every next token: a text ends once `window_size` tokens
    in a row had, in the raw logits, a probability of more than `threshold`.
    """

    enable_early_stop: bool = option(True, "False keeps the other values and does nothing.")
    strategy: str = option("repetition", "What is looked for.", choices=("repetition",))
    window_size: int = option(3000, "Tokens in a row that the model has to be sure of.", least=1)
    threshold: float = option(0.99, "The probability above which it is.")

    def __post_init__(self) -> None:
        check_bounds(self)
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
UNSUPPORTED_SPECULATION: dict[str, tuple[Any, ...]] = {
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
    values = without_unsupported(values, UNSUPPORTED_SPECULATION, "speculative_config")
    if values.get("method") == "ngram_match":  # the name in some of FastDeploy's versions
        values["method"] = "ngram"
    return fill([Speculation], values, "speculative_config")[0]


def without_unsupported(
    values: Mapping[str, Any],
    unsupported: Mapping[str, tuple[Any, ...]],
    origin: str,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """`values` without the keys of `unsupported`, whose values must be among those listed there.

    Raises ConfigError with the reason, where one is known.
    """
    kept = {}
    for key, value in values.items():
        if key not in unsupported:
            kept[key] = value
        elif str(value).lower() not in {str(neutral).lower() for neutral in unsupported[key]}:
            reason = reasons.get(key, "asks for something that is not available")
            raise ConfigError(
                f"{key}={value!r} in {origin} {reason}; leave it out or use {unsupported[key][0]!r}"
            )
    return kept
