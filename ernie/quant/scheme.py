"""Quantisation schemes as data: which weights of a model take which form.

    wint8       every product 8 bits, one scale for each output channel
    wint4       routed experts 4 bits, everything else 8 (the published meaning, where the experts
                are nearly the whole model); a dense model has its MLPs and attention in 4 bits
    wint4_all   4 bits wherever wint4 has 8
    head        6 bits with wint4 and wint4_all: a small model reads more of it than of its blocks

Training has names of its own for the frozen weights beside adapters (`FROZEN`).

A scheme may also be written as the published JSON object, for example
`{"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}`; vision
experts are like the others where `image_moe_quant_type` says nothing else.
Norms, routers, biases, the embedding table, and the vision tower and resampler of multimodal models
keep their values. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ernie.settings import ConfigError

BITS_BY_TYPE = {"wint8": 8, "wint4": 4, "none": None}
_FIELD_BY_TYPE = {
    "dense_quant_type": "dense",
    "moe_quant_type": "experts",
    "image_moe_quant_type": "vision_experts",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits of the weights of each part of a model; None leaves them as they are."""

    name: str
    dense: int | None  # attention, dense MLPs, shared experts
    experts: int | None  # routed experts
    vision_experts: int | None  # those of the multimodal models' second bank
    head: int | None  # the projection to the vocabulary
    kv_cache: str | None = None  # a dtype name; None leaves the choice to the engine


SCHEMES = {
    "wint8": Scheme("wint8", dense=8, experts=8, vision_experts=8, head=8),
    "wint4": Scheme("wint4", dense=8, experts=4, vision_experts=4, head=6),
    "wint4_all": Scheme("wint4_all", dense=4, experts=4, vision_experts=4, head=6),
}


@dataclass(frozen=True, slots=True)
class Frozen:
    """Formats (`ernie.kernels.weights`) of the frozen weights beside which adapters are trained.

    Embedding and head keep their values.
    """

    dense: str  # attention, dense MLPs, shared experts
    experts: str  # routed experts


# By ERNIEKit's `compute_type`.
FROZEN = {
    "wint8": Frozen("int8", "int8"),
    "wint4/8": Frozen("int8", "int4"),
    "nf4": Frozen("nf4", "nf4"),
}


def read_scheme(given: str | Mapping[str, Any] | None, *, has_experts: bool) -> Scheme | None:
    """The scheme that a name, a JSON object or its text stands for; None for none.

    Raises ConfigError.
    """
    if given is None or given in ("none", ""):
        return None
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        return _named(given, has_experts)
    return _from_object(_as_object(given), has_experts)


def _as_object(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"quantization={given!r} is not a JSON object: {error}") from None


def _from_object(given: Mapping[str, Any], has_experts: bool) -> Scheme:
    known = {
        "quantization", "dense_quant_type", "moe_quant_type", "kv_cache_quant_type",
        "image_moe_quant_type", "is_quantized", "is_permuted", "is_channel_wise", "has_zero_point",
    }  # fmt: skip
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"quantization has {unknown}; it takes {', '.join(sorted(known))}")
    cache = given.get("kv_cache_quant_type")
    if cache not in (None, "int8"):
        raise ConfigError(
            f"kv_cache_quant_type={cache!r} is not available; use int8 or leave it out"
        )
    name = given.get("quantization")
    if name != "mix_quant":
        scheme = _named(name, has_experts)
        for key, field in _FIELD_BY_TYPE.items():
            if key in given and _bits(given, key) != (bits := getattr(scheme, field)):
                raise ConfigError(
                    f"quantization={name} has {bits} bits for what {key}={given[key]} is about; "
                    "leave one of them out, or use mix_quant"
                )
        return replace(scheme, kv_cache=cache)
    dense, experts = (_bits(given, key) for key in ("dense_quant_type", "moe_quant_type"))
    vision = _bits(given, "image_moe_quant_type") if "image_moe_quant_type" in given else experts
    return Scheme("mix_quant", dense, experts, vision, 8 if dense else None, cache)


def _named(name: Any, has_experts: bool) -> Scheme:
    if name not in SCHEMES:
        raise ConfigError(
            f"quantization={name!r} is not known; use one of {', '.join(SCHEMES)}, or an object "
            "with mix_quant"
        )
    return SCHEMES["wint4_all" if name == "wint4" and not has_experts else name]


def _bits(given: Mapping[str, Any], key: str) -> int | None:
    value = given.get(key, "none")
    if value not in BITS_BY_TYPE:
        raise ConfigError(f"{key}={value!r} is not available; use one of {', '.join(BITS_BY_TYPE)}")
    return BITS_BY_TYPE[value]
