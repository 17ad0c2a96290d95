"""Folders of adapters, those of the PEFT library: what training writes, and starts from.

    adapter_config.json          rank, scale, `use_dora`, `init_lora_weights`, `target_modules`
    adapter_model.safetensors    pairs, and DoRA's magnitudes, under PEFT's names

Pairs of experts lie stacked, as they are trained; `peft_form` turns them into PEFT's own form,
where it has one, and a PiSSA adapter into one of twice the rank that stands beside the whole base.
Reading takes all of these forms (`ernie.adapter_files`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ernie.adapter_files import SETTINGS, WEIGHTS, Settings, read_tensors, spellings
from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit.lora import TRAINED, LoRA, add_lora, pairs, principal, projections
from erniekit.lora_targets import shortest

log = logging.getLogger("erniekit")

ADAPTER_CONFIG, ADAPTER_FILE = SETTINGS, WEIGHTS
_PREFIX = "base_model.model."
_BARE = ".lora_magnitude_vector"  # has no `.weight` behind it


def file_name(parameter: str) -> str:
    """The name in the file of a trained parameter."""
    return _PREFIX + parameter + ("" if parameter.endswith(_BARE) else ".weight")


def parameter_name(in_file: str) -> str:
    """The way back from `file_name`."""
    return in_file.removeprefix(_PREFIX).removesuffix(".weight")


def adapter_tensors(model: ErnieModel) -> dict[str, Tensor]:
    """The trained parts under their names in the file."""
    return {
        file_name(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(TRAINED)
    }


def adapter_config(model: ErnieModel, lora: LoRA, base: str) -> str:
    """The text of `adapter_config.json` for a model with adapters."""
    wrapped = [name for name, pair, _ in pairs(model) if pair.lora_A.dim() == 2]
    return config_text(lora, wrapped, _linear_names(model), base)


def config_text(
    lora: LoRA, wrapped: list[str], linear: list[str], base: str, **more: object
) -> str:
    """`wrapped` are the modules with pairs among `linear`, all that could have one."""
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.is_rank_stabilised,
        "use_dora": lora.has_magnitude,
        "init_lora_weights": "pissa" if lora.is_principal else True,
        "target_modules": shortest(linear, wrapped),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(values | more, indent=2) + "\n"


def _linear_names(model: ErnieModel) -> list[str]:
    """Modules of two-dimensional weights, of a model with or without adapters."""
    plain = ErnieModel(model.config, device="meta")
    return [name for name, weight in projections(plain) if weight.dim() == 2]


def form_of(settings: Settings) -> LoRA:
    """What the adapter of a folder is like. Raises ConfigError for what cannot be trained on."""
    for key, table in (
        ("rank_pattern", settings.rank_by_pattern),
        ("alpha_pattern", settings.alpha_by_pattern),
    ):
        if table:
            raise ConfigError(
                f"{key} in {settings.origin} gives modules ranks or scales of their own, which "
                "can be served but not trained; give an adapter of one rank"
            )
    return LoRA(
        settings.rank,
        settings.alpha,
        settings.is_rank_stabilised,
        settings.has_magnitude,
        settings.is_principal,
    )


def read_adapter(
    folder: Path, config: ErnieConfig, base: str | Path
) -> tuple[LoRA, dict[str, Tensor]]:
    """An adapter for the model `base` of `config`: what it is like, its weights being the targets,
    and its float32 tensors by parameter.

    Warns where it was trained beside another model: shapes alone do not tell models apart, and a
    folder may have been moved. Raises ConfigError or CheckpointError.
    """
    settings, tensors = read_tensors(folder, config)
    if settings.base and Path(settings.base).resolve() != Path(base).resolve():
        log.warning(
            "the adapter in %s was trained beside %s and is put on %s: unless that is the same "
            "model in another place, what comes out is of no use",
            folder,
            settings.base,
            base,
        )
    weights = sorted({name.rpartition(".")[0] for name in tensors})
    return replace(form_of(settings), targets=tuple(weights)), tensors


@torch.no_grad()
def load_adapter(model: ErnieModel, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Fill the trained parts of a model, by parameter.

    Raises ConfigError naming the first tensor that is missing, left over or of another shape: an
    adapter that would silently do nothing is refused.
    """
    expected = {n: p for n, p in model.named_parameters() if n.endswith(TRAINED)}
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            where = "missing in" if name not in tensors else "unknown to this model but in"
            raise ConfigError(
                f"{name} is {where} {origin}; the adapter belongs to another model, or has other "
                "lora_target_modules"
            )
        if tensors[name].shape != expected[name].shape:
            raise ConfigError(
                f"{name} in {origin} is {tuple(tensors[name].shape)}; this model and rank want "
                f"{tuple(expected[name].shape)}"
            )
        expected[name].copy_(tensors[name])


# --- other forms ---


def beside_the_base(
    base: ErnieModel, lora: LoRA, tensors: Mapping[str, Tensor]
) -> tuple[LoRA, dict[str, Tensor]]:
    """An adapter as one of ordinary LoRA (or DoRA) that stands beside the whole plain `base`.

    PiSSA stands beside `W - scale B0 A0`: `scale (B A - B0 A0)` is a pair of twice the rank, `[A;
    A0]` and `[B, -B0]`. Source: Meng et al., arXiv:2404.02948, appendix C.
    """
    if not lora.is_principal:
        return lora, dict(tensors)
    weights, found = dict(projections(base)), {}
    for name in sorted({n.rpartition(".")[0] for n in tensors}):
        a0, b0 = principal(weights[name].detach(), lora)
        found[f"{name}.lora_A"] = torch.cat((tensors[f"{name}.lora_A"], a0), -2)
        found[f"{name}.lora_B"] = torch.cat((tensors[f"{name}.lora_B"], -b0), -1)
    return lora.doubled(), found


def put_in(base: ErnieModel, folder: Path, name: str | Path) -> None:
    """The adapter of a folder beside a whole plain model, which lies in (or is called) `name`, in
    place: ready to compute or to merge.

    Raises ConfigError or CheckpointError.
    """
    form, tensors = beside_the_base(base, *read_adapter(folder, base.config, name))
    add_lora(base, form, seed=0)
    load_adapter(base, tensors, str(folder / ADAPTER_FILE))


def peft_form(
    base: ErnieModel, lora: LoRA, tensors: Mapping[str, Tensor], name: str, origin: str
) -> tuple[str, dict[str, Tensor]]:
    """Config text and tensors of an adapter as PEFT loads it beside the same model in transformers,
    whose names they have.

    `base` is the plain model, `name` what the config calls it. Raises ConfigError for what PEFT
    has no form for.
    """
    lora, tensors = beside_the_base(base, lora, tensors)
    there = {n.rpartition(".")[0] for n in tensors}
    is_stack = {name: weight.dim() == 3 for name, weight in projections(base)}
    stacks = [name for name in is_stack if is_stack[name]]
    linear = [name for name in is_stack if not is_stack[name]]
    _check_stacks(lora, stacks, there, origin)
    has_vision = base.config.vision_config is not None
    if stacks and not has_vision:
        _check_mixture(sorted(there - {*stacks}), origin)
    theirs = {name: spellings(name)[has_vision] for name in is_stack}
    ends = {f"mlp.{theirs[name].partition('.mlp.')[2]}" for name in stacks if name in there}
    files = {}
    for parameter, tensor in tensors.items():
        weight, _, part = parameter.rpartition(".")
        if not is_stack[weight]:
            files[file_name(f"{theirs[weight]}.{part}")] = tensor
            continue
        experts, _, leaf = theirs[weight].rpartition(".")
        is_inner = leaf == "gate_up_proj" and weight.replace(leaf, "down_proj") in there
        inner = ".base_layer" if is_inner else ""
        flat = tensor.flatten(0, 1) if part == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
        files[file_name(f"{experts}{inner}.{part}")] = flat.contiguous()
    wrapped, names = ([theirs[n] for n in which] for which in (there - {*stacks}, linear))
    more = {"target_parameters": sorted(ends, reverse=True)} if ends else {}
    return config_text(lora, wrapped, names, name, **more), files


def _check_stacks(lora: LoRA, stacks: list[str], there: set[str], origin: str) -> None:
    """Of each weight of a bank of experts, PEFT has pairs in all layers or in none, and no DoRA."""
    kinds = {name.partition(".mlp.")[2] for name in stacks if name in there}
    missing = [n for n in stacks if n.partition(".mlp.")[2] in kinds and n not in there]
    if kinds and (lora.has_magnitude or missing):
        what = "DoRA on routed experts" if lora.has_magnitude else "experts of some layers only"
        raise ConfigError(
            f"the adapter in {origin} has {what}, for which PEFT has no form; leave export_format "
            "out for the merged model"
        )


def _check_mixture(linear: list[str], origin: str) -> None:
    """PEFT takes `gate_proj`, `up_proj`, `down_proj` of a mixture of experts for its experts'; not
    so of a multimodal one.
    """
    if refused := [w for w in linear if ".mlp." in w]:
        raise ConfigError(
            f"the adapter in {origin} has a pair for {refused[0]} and {len(refused) - 1} more of "
            "its kind, which PEFT takes for pairs of the routed experts; leave export_format out "
            "for the merged model, or train lora_target_modules=q_proj,k_proj,v_proj,o_proj,experts"
        )
