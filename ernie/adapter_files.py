"""Adapters read from a folder in the format of the PEFT library, strictly.

    adapter_config.json            rank, scale, which modules have a pair
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight (r, in), lora_B (out, r)
                                   base_model.model.<module>.lora_magnitude_vector (out,)   DoRA

Routed experts have pairs for each of their two projections, in one of two forms:

    ours     <experts>.gate_up_proj.lora_A.weight (E, r, in), lora_B (E, out, r), and magnitudes
             (E, out); no entry of `target_modules` names them
    PEFT's   `target_parameters` names gate_up_proj, down_proj or both: the last one of these is
             <experts>.lora_A.weight (E r, in), lora_B (out, r E), and where both are there the
             first is <experts>.base_layer.lora_A.weight

A module of a multimodal model has our name or that of transformers, model.language_model.layers...,
where the two banks of experts are mlp.text_moe.experts and mlp.vision_moe.experts.

An adapter that would silently do less than it says is refused: every tensor must land on a module
of the model, have its counterpart and the shape of its rank, and every module that is named must be
there. So is every setting that changes the arithmetic and is not known here (biases, trained
modules and tokens, quantised forms), by its name. DoRA and PiSSA adapters are read for training;
serving adds products to rows, which they are not, and refuses them.

Legend: r rank of one module, R of all parts of a fused product, I/O in/out width, E experts.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernie.adapters import Adapter, LayerPairs, Pair
from ernie.checkpoint.folder import Stored, read_header
from ernie.config import ErnieConfig
from ernie.layers import Linear
from ernie.model import ErnieModel
from ernie.moe.experts import Experts
from ernie.settings import ConfigError

log = logging.getLogger(__name__)

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(magnitude_vector))")
MAGNITUDE = "magnitude_vector"
_STACKED = ("gate_up_proj", "down_proj")  # in the order in which PEFT wraps them
_BANKS = {"experts": "text_moe.experts", "vision_experts": "vision_moe.experts"}

# Fused products and the modules that are their parts; `mlp` is the dense block or the shared
# experts.
PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("{mlp}.gate_proj", "{mlp}.up_proj"),
    "down": ("{mlp}.down_proj",),
    "experts.gate_up": ("mlp.experts.gate_up_proj",),
    "experts.down": ("mlp.experts.down_proj",),
    "vision_experts.gate_up": ("mlp.vision_experts.gate_up_proj",),
    "vision_experts.down": ("mlp.vision_experts.down_proj",),
}

# Keys of adapter_config.json that are read, and those that cannot change what an adapter computes.
# Any other key has to be null, false or empty.
READ = {"r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"}
READ |= {"layers_to_transform", "peft_type", "bias", "init_lora_weights"}
READ |= {"use_dora", "target_parameters"}
HARMLESS = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
HARMLESS |= {"lora_dropout", "peft_version", "megatron_core", "runtime_config"}
HARMLESS |= {"qalora_group_size"}  # means something with use_qalora only
HARMLESS |= {"eva_config"}  # how such a pair began, which left the base as it was
# Other ways to begin move part of the base model into the adapter, as "pissa" does.
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `adapter_config.json` says; see the documentation of `peft.LoraConfig`."""

    origin: str
    rank: int
    alpha: float
    is_rank_stabilised: bool
    targets: str | Sequence[str]  # a pattern of whole names, or ends of names
    rank_by_pattern: Mapping[str, int]
    alpha_by_pattern: Mapping[str, float]
    layers: Sequence[int] | None  # None: all
    parameters: Sequence[str] = ()  # ends of names of stacked weights
    has_magnitude: bool = False  # DoRA
    is_principal: bool = False  # PiSSA
    base: str = ""  # folder or hub name of the model it was trained beside; empty: not said

    def wants(self, module: str) -> bool:
        """Whether a module is named as one that has a pair."""
        if isinstance(self.targets, str):
            return any(re.fullmatch(self.targets, name) for name in spellings(module))
        layer = int(module.split(".")[2])
        return (self.layers is None or layer in self.layers) and any(
            _ends_with(module, target) for target in self.targets
        )

    def stacked(self, module: str) -> bool:
        """Whether a stack of experts is named as one that has a pair."""
        return any(_ends_with(module, parameter) for parameter in self.parameters)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_by_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) where ranks are stabilised (arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_by_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_adapter(
    folder: str | Path,
    config: ErnieConfig,
    *,
    max_rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapter:
    """The adapter in `folder`, for a model of `config`, rounded once to `dtype`.

    Raises ConfigError or CheckpointError, one sentence that names what does not fit.
    """
    settings = read_settings(Path(folder) / SETTINGS)
    for is_there, key, what in (
        (settings.has_magnitude, "use_dora=true", "rescales the rows of the base's own weights"),
        (settings.is_principal, "init_lora_weights=pissa", "stands beside another base"),
    ):
        if is_there:
            raise ConfigError(
                f"{key} in {settings.origin}: such an adapter {what} and is not served by itself; "
                "merge it into its base first (erniekit export)"
            )
    shapes = module_shapes(config)
    path, stored = _stored(Path(folder), settings, shapes, max_rank)
    if not any(_values(p["B"], settings.rank_of(m)).any() for m, p in stored.items()):
        log.warning("every lora_B in %s is zero: the adapter changes nothing", path)
    products = [products_of(config, layer) for layer in range(config.num_hidden_layers)]
    left = stored.keys() - {m for layer in products for parts in layer.values() for m in parts}
    assert not left, f"{_some(left)}: no product has these as parts"
    layers = tuple(_layer_pairs(of, shapes, stored, settings, dtype, device) for of in products)
    return Adapter(layers, max(map(settings.rank_of, stored)))


def read_tensors(folder: str | Path, config: ErnieConfig) -> tuple[Settings, dict[str, Tensor]]:
    """Settings and float32 tensors of an adapter of any form, for training.

    Names are those of parameters beside a model of `config`: `<module>.lora_A`, `.lora_B`,
    `.lora_magnitude_vector`; those of experts stacked. Raises as `read_adapter` does.
    """
    settings = read_settings(Path(folder) / SETTINGS)
    _, stored = _stored(Path(folder), settings, module_shapes(config), None)
    tensors = {}
    for module, parts in stored.items():
        for part, tensor in parts.items():
            tensors[f"{module}.lora_{part}"] = _values(tensor, settings.rank_of(module))
    return settings, tensors


def _stored(
    folder: Path,
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    max_rank: int | None,
) -> tuple[Path, dict[str, dict[str, Stored]]]:
    """The weights' file, and its tensors by module and part, all of them checked."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {WEIGHTS}; give the folder of a saved LoRA adapter")
    stored = _matched(read_header(path), shapes, settings, str(path))
    _check_targets(settings, shapes, stored)
    for module in stored:
        _check_shapes(module, stored[module], shapes[module], settings, max_rank)
    return path, stored


def module_shapes(config: ErnieConfig) -> dict[str, tuple[int, ...]]:
    """The weights that an adapter can change, by module: `(O, I)`, of stacked experts `(E, O, I)`.

    Projections of the main blocks; not embedding, head, routers, norms and prediction blocks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in ErnieModel(config, device="meta").named_modules():
        if not name.startswith("model.layers."):
            continue
        if isinstance(module, Linear):
            shapes[name] = tuple(module.weight.shape)
        elif isinstance(module, Experts):
            shapes[f"{name}.gate_up_proj"] = tuple(module.gate_up_proj.shape)
            shapes[f"{name}.down_proj"] = tuple(module.down_proj.shape)
    return shapes


# --- adapter_config.json ---


def read_settings(path: Path) -> Settings:
    """Raises ConfigError for what is missing, of a wrong type, or not served."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} holds no {SETTINGS}; give a LoRA adapter") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it anew") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; it must hold an object")
    for key, value in values.items():
        if key not in READ | HARMLESS and value not in (None, False, "", [], {}):
            raise _refused(path, key, value, "that is not served here")
    for key, served in (
        ("peft_type", ("LORA",)),
        ("bias", ("none", None)),
        ("init_lora_weights", BEGINNINGS),
    ):
        if values.get(key) not in served:
            raise _refused(path, key, values.get(key), f"served is {served[0]!r}")
    parameters = values.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(v, str) for v in parameters):
        raise _refused(path, "target_parameters", parameters, "it takes a list of names")
    layers = values.get("layers_to_transform")
    return Settings(
        origin=str(path),
        rank=_checked(path, "r", values.get("r"), _RANK),
        alpha=_checked(path, "lora_alpha", values.get("lora_alpha"), _NUMBER),
        is_rank_stabilised=_checked(path, "use_rslora", values.get("use_rslora", False), _FLAG),
        targets=_targets(path, values.get("target_modules")),
        rank_by_pattern=_table(path, "rank_pattern", values.get("rank_pattern"), _RANK),
        alpha_by_pattern=_table(path, "alpha_pattern", values.get("alpha_pattern"), _NUMBER),
        layers=None if layers is None else _layer_numbers(path, layers),
        parameters=parameters,
        has_magnitude=_checked(path, "use_dora", values.get("use_dora", False), _FLAG),
        is_principal=values.get("init_lora_weights") == "pissa",
        base=str(values.get("base_model_name_or_path") or ""),
    )


def _refused(path: Path, key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{key}={json.dumps(value)[:200]} in {path}: {why}")


class _Kind(NamedTuple):
    """What a value must be."""

    has: Callable[[Any], bool]
    words: str


_RANK = _Kind(lambda value: type(value) is int and value > 0, "a positive integer")
_NUMBER = _Kind(
    lambda value: type(value) in (int, float) and math.isfinite(value), "a finite number"
)
_FLAG = _Kind(lambda value: type(value) is bool, "true or false")


def _checked(path: Path, key: str, value: Any, kind: _Kind) -> Any:
    if not kind.has(value):
        raise _refused(path, key, value, f"it takes {kind.words}")
    return value


def _table(path: Path, key: str, value: Any, kind: _Kind) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise _refused(path, key, value, "it takes an object of patterns")
    for pattern, entry in (value or {}).items():
        _checked(path, f"{key}[{pattern!r}]", entry, kind)
        _check_pattern(path, key, pattern)
    return value or {}


def _targets(path: Path, value: Any) -> str | list[str]:
    if isinstance(value, str) and value:
        _check_pattern(path, "target_modules", value)
        return value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _refused(path, "target_modules", value, "it takes a list of names, or a pattern")
    return value


def _layer_numbers(path: Path, value: Any) -> list[int]:
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise _refused(path, "layers_to_transform", value, "it takes numbers of layers")
    return numbers


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _refused(path, key, pattern, f"it is not a regular expression ({error})") from None


def spellings(module: str) -> tuple[str, str]:
    """Our name of a module, and that of a multimodal model in transformers."""
    theirs = module.replace("model.layers.", "model.language_model.layers.", 1)
    for ours, bank in _BANKS.items():
        theirs = theirs.replace(f".mlp.{ours}.", f".mlp.{bank}.")
    return module, theirs


def _own_name(module: str) -> str:
    """The way back from the second of `spellings`; our own names stay."""
    module = module.replace("model.language_model.layers.", "model.layers.", 1)
    for ours, bank in _BANKS.items():
        module = re.sub(rf"\.mlp\.{re.escape(bank)}(?=\.|$)", f".mlp.{ours}", module)
    return module


def _ends_with(module: str, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in spellings(module))


def _by_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry of the first pattern that matches whole parts at the end of a name."""
    for pattern, value in table.items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in spellings(module)):
            return value
    return default


# --- adapter_model.safetensors against the model ---


def _matched(
    tensors: Sequence[Stored], shapes: Mapping[str, Any], settings: Settings, origin: str
) -> dict[str, dict[str, Stored]]:
    """`{module: {"A": ..., "B": ...}}` of all tensors, with magnitudes where there are any."""
    found: dict[str, dict[str, Stored]] = {}
    unknown = []
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        module = "" if match is None else _module(match[1], settings)
        if match is None or module not in shapes or (match[3] and not settings.has_magnitude):
            unknown.append(tensor.name)
        else:
            found.setdefault(module, {})[match[2] or match[3]] = tensor
    if unknown:
        raise ConfigError(
            f"{origin} has tensors that belong to no projection of this model: {_some(unknown)}"
        )
    parts = {"A", "B", MAGNITUDE} if settings.has_magnitude else {"A", "B"}
    single = [
        f"{module}.lora_{part}" for module in found for part in sorted(parts - found[module].keys())
    ]
    if single:
        raise ConfigError(f"{origin} lacks the other half of a pair: {_some(single)}")
    if not found:
        raise ConfigError(f"{origin} holds no tensor; it is not an adapter")
    return found


def _module(name: str, settings: Settings) -> str:
    """The weight that a name in the file is of; PEFT's wrappers of a stack are told apart."""
    name = _own_name(name)
    if not settings.parameters or not re.search(r"\.(vision_)?experts(\.base_layer)?$", name):
        return name
    stack = name.removesuffix(".base_layer")
    wrapped = [leaf for leaf in _STACKED if settings.stacked(f"{stack}.{leaf}")]
    if not wrapped or (name != stack and len(wrapped) == 1):
        return name
    return f"{stack}.{wrapped[0] if name != stack else wrapped[-1]}"


def _check_targets(
    settings: Settings, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]
) -> None:
    """That the modules named and those with tensors are the same. Our form names no experts."""
    named = {m for m, shape in shapes.items() if len(shape) == 2 and settings.wants(m)}
    there = {m for m in found if len(shapes[m]) == 2}
    if settings.parameters:
        stacked = [m for m, shape in shapes.items() if len(shape) == 3]
        named |= {m for m in stacked if settings.stacked(m)}
        there |= {m for m in found if len(shapes[m]) == 3}
    if isinstance(settings.targets, str):
        idle = [] if named or not there else [settings.targets]
    else:
        idle = [t for t in settings.targets if not any(_ends_with(m, t) for m in named)]
    idle += [t for t in settings.parameters if not any(_ends_with(m, t) for m in named)]
    if idle:
        key = "target_parameters" if idle[0] in settings.parameters else "target_modules"
        raise ConfigError(
            f"{key} in {settings.origin} names what matches no projection of this "
            f"model's blocks: {_some(idle)}"
        )
    if missing := sorted(named - there):
        raise ConfigError(f"{settings.origin} names modules without tensors: {_some(missing)}")
    if extra := sorted(there - named):
        raise ConfigError(
            f"target_modules in {settings.origin} does not name modules with tensors: "
            f"{_some(extra)}"
        )


def _check_shapes(
    module: str,
    pair: Mapping[str, Stored],
    shape: tuple[int, ...],
    settings: Settings,
    max_rank: int | None,
) -> None:
    rank = settings.rank_of(module)
    if max_rank is not None and rank > max_rank:
        raise ConfigError(
            f"{settings.origin} gives {module} rank {rank}; max_lora_rank={max_rank} allows no "
            "more: raise it, or train with a lower rank"
        )
    *experts, out_size, in_size = shape
    wanted = {"A": (*experts, rank, in_size), "B": (*experts, out_size, rank)}
    wanted[MAGNITUDE] = (*experts, out_size)
    for side, stored in pair.items():
        if experts and _is_flat(stored):
            flat = experts[0] * rank
            wanted |= {"A": (flat, in_size), "B": (out_size, flat)}
        if stored.shape != wanted[side]:
            raise ConfigError(
                f"{stored.name} in {stored.file} is {stored.shape}; this model and rank {rank} "
                f"want {wanted[side]}"
            )


def products_of(config: ErnieConfig, layer: int) -> dict[str, list[str]]:
    """The modules that are the parts of each fused product of a layer, those it has not too."""
    mlp = "mlp.shared_experts" if config.is_moe_layer(layer) else "mlp"
    return {
        product: [f"model.layers.{layer}.{part.format(mlp=mlp)}" for part in parts]
        for product, parts in PRODUCTS.items()
    }


def _layer_pairs(
    products: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Mapping[str, Stored]],
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerPairs:
    pairs = {}
    for product, modules in products.items():
        if any(module in stored for module in modules):
            a_RI, b_OR = _fused(modules, shapes, stored, settings)
            pairs[product] = Pair(a_RI.to(device, dtype), b_OR.to(device, dtype))
    return pairs


def _fused(
    modules: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Mapping[str, Stored]],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """A and B, in float32, of a product whose parts are `modules`, some of them without a pair."""
    halves = [_scaled_pair(m, stored[m], settings) if m in stored else None for m in modules]
    if len(halves) == 1 and halves[0] is not None:
        return halves[0]
    present = [half for half in halves if half is not None]
    a_RI = torch.cat([a for a, _ in present])
    b_OR = torch.zeros(sum(shapes[module][0] for module in modules), len(a_RI))
    row = column = 0
    for module, half in zip(modules, halves):
        out_size = shapes[module][0]
        if half is not None:
            rank = len(half[0])
            b_OR[row : row + out_size, column : column + rank] = half[1]
            column += rank
        row += out_size
    return a_RI, b_OR


def _scaled_pair(
    module: str, pair: Mapping[str, Stored], settings: Settings
) -> tuple[Tensor, Tensor]:
    rank = settings.rank_of(module)
    return _values(pair["A"], rank), _values(pair["B"], rank) * settings.scale_of(module)


def _is_flat(stored: Stored) -> bool:
    """Whether a pair is of PEFT's form of a stack."""
    return re.search(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$", stored.name) is not None


def _values(stored: Stored, rank: int) -> Tensor:
    values = torch.cat([rows.float() for _, rows in stored.rows()])
    if not values.isfinite().all():
        raise ConfigError(f"{stored.name} in {stored.file} has values that are no finite numbers")
    if not _is_flat(stored):
        return values
    if stored.name.endswith("lora_A.weight"):
        return values.unflatten(0, (-1, rank))
    return values.unflatten(1, (rank, -1)).permute(2, 0, 1)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
