"""The model of a run: read or made anew, with adapters beside frozen weights that may be brought
into few bits while they are read, and with recomputation where wanted.

Also what a configuration looks like for a hub name without reading anything, which lets every
example file be checked on the meta device.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase as fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ernie
from ernie import kernels
from ernie.checkpoint.hub import NOT_SET, already_here, resolve
from ernie.config import ErnieConfig
from ernie.kernels.weights import QuantTensor
from ernie.layers import Linear
from ernie.model import Block
from ernie.models import MODELS, TINY
from ernie.moe.experts import Experts
from ernie.moe.router import Router
from ernie.quant.scheme import FROZEN
from ernie.settings import ConfigError, did_you_mean
from ernie.tokenizer import Tokenizer
from erniekit import lora_files
from erniekit.config import Run
from erniekit.config.model import TOWER, parts_again
from erniekit.lora import TRAINED, Freeze, LoRA, Preparation, add_lora, weight_names
from erniekit.recompute import recompute
from erniekit.reward_model import CONFIG_KEY, fill_head, has_head, mark, put_head

log = logging.getLogger("erniekit")


def config_of(path_or_name: str) -> ErnieConfig:
    """The network of a folder, of a hub repository that was fetched before, or of a released model
    by its hub name; nothing is fetched.
    """
    if not path_or_name:
        raise ConfigError(NOT_SET)
    folder = Path(path_or_name) if Path(path_or_name).is_dir() else already_here(path_or_name)
    if folder is not None:
        return ErnieConfig.from_folder(folder)
    name = path_or_name.rpartition("/")[2].removesuffix("-Paddle").removesuffix("-PT")
    if name in MODELS:
        return MODELS[name].config
    if name in TINY:
        return TINY[name]
    near = did_you_mean(name, MODELS)
    raise ConfigError(
        f"{path_or_name!r} is no folder, was not fetched from the hub before, and is no model "
        f"of the family{near}"
    )


def check_layers(run: Run, config: ErnieConfig) -> None:
    """Raise ConfigError for layers, or a tower, in the settings that the model does not have."""
    again = parts_again(run.model.recompute_layers)
    numbered = {
        "no_recompute_layers": run.model.no_recompute_layers,
        "recompute_layers": [part for part in again if isinstance(part, int)],
    }
    if TOWER in again and (why := _why_no_tower_again(run, config)):
        raise ConfigError(f"recompute_layers=full:tower: {why}; leave it out")
    last = config.num_hidden_layers - 1
    for key, layers in numbered.items():
        if max(layers, default=0) > last:
            raise ConfigError(f"{key}={max(layers)} is not a layer of the model; give 0 to {last}")


def _why_no_tower_again(run: Run, config: ErnieConfig) -> str | None:
    if config.vision_config is None:
        return "the model has none"
    if not run.stage.reads_pictures:
        return f"stage={run.model.stage} reads no pictures"
    if run.is_lora or "freeze_vision" in run.model.freeze_config:
        return f"{'LoRA' if run.is_lora else 'freeze_vision'} does not train it"
    return None


def weights_dtype(run: Run, device: str) -> torch.dtype:
    """Float32 for weights that are trained on a CPU: bfloat16 ones would lose small updates.

    Frozen ones stay bfloat16; on a GPU the optimizer keeps the float32 originals.
    """
    return torch.float32 if device == "cpu" and not run.is_lora else torch.bfloat16


def build_model(
    run: Run, device: str, weights_from: Path | None = None, *, in_host_memory: bool = False
) -> ernie.ErnieModel:
    """The model with its tokenizer, ready to be trained; adapters have their start values.

    `weights_from` is the folder of a full checkpoint that takes the place of the base model; with
    `in_host_memory` the model for `device` is not put there yet. Raises ConfigError or
    CheckpointError in one sentence.
    """
    choose_products(run, device)
    model = read_model(run, device, weights_from, in_host_memory=in_host_memory)
    if run.is_lora and run.model.compute_type == "bf16":
        add_lora(model, lora_of(run), seed=run.training.seed)
    elif not run.is_lora:
        _choose_trained(model, run)
    if run.stage.has_reward_head:
        folder = weights_from or resolve(run.model.model_name_or_path)
        put_head(model, folder, seed=run.training.seed)
    elif CONFIG_KEY in model.config.extra:
        log.warning(
            "the reward head of %s is left out: stage=%s does not train it",
            run.model.model_name_or_path,
            run.model.stage,
        )
        mark(model, has_head=False)
    for router in model.modules():
        if isinstance(router, Router):
            router.capacity = run.model.moe_capacity
    recompute(model, run.recomputed)
    return model


def choose_products(run: Run, device: str) -> None:
    """Have this process multiply as `cpu_products` says; raises ConfigError where it cannot, or
    where a GPU has no products for `compute_type`."""
    try:
        kernels.bfloat16_products(device == "cpu" and run.model.cpu_products == "bfloat16")
    except ValueError as error:
        raise ConfigError(f"cpu_products=bfloat16: {error}") from None
    if run.model.compute_type != "fp8":
        return
    if device == "cpu":
        log.info(
            "compute_type=fp8 on a CPU: values are rounded to 8 bits and multiplied in float32, "
            "which shows what FP8 does to a model and is slower than bf16"
        )
    elif torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            "compute_type=fp8 needs a GPU from Ada or Hopper on, not "
            f"{torch.cuda.get_device_name()}; use bf16"
        )


def read_model(
    run: Run, device: str, weights_from: Path | None = None, *, in_host_memory: bool = False
) -> ernie.ErnieModel:
    """The base model of a run as it is on disk, or a new one with random weights.

    With frozen weights in few bits it has its adapters, which change nothing yet.
    """
    model = _base_model(run, device, weights_from, in_host_memory)
    if run.model.compute_type == "fp8":
        multiply_in_fp8(model, quant_input_grad=run.model.quant_input_grad)
    return model


def multiply_in_fp8(model: ernie.ErnieModel, *, quant_input_grad: bool) -> None:
    """Have attention, dense blocks and experts multiply in FP8; what stands around the blocks
    (embedding, head, tower, resampler) and the routers do not.
    """
    dense = partial(kernels.fp8_linear, quant_input_grad=quant_input_grad)
    of_experts = partial(kernels.fp8_grouped_linear, quant_input_grad=quant_input_grad)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, Linear):
            module.product = dense
        elif isinstance(module, Experts):
            module.product = of_experts


def _base_model(
    run: Run, device: str, weights_from: Path | None, in_host_memory: bool
) -> ernie.ErnieModel:
    if run.is_lora and run.model.compute_type != "bf16":
        return _read_frozen(run, "cpu" if in_host_memory else device)
    source = weights_from or run.model.model_name_or_path
    dtype = weights_dtype(run, device)
    device = "cpu" if in_host_memory else device
    if weights_from:
        # The tokenizer's files are copied at every save: not out of a checkpoint, which is removed.
        model = ernie.load(weights_from, dtype=dtype, device=device)
        model.tokenizer = Tokenizer.from_folder(resolve(run.model.model_name_or_path))
        return model
    if run.model.continue_training:
        return ernie.load(source, dtype=dtype, device=device)
    return _new_model(run, device)


def _new_model(run: Run, device: str) -> ernie.ErnieModel:
    source = run.model.model_name_or_path
    dtype = weights_dtype(run, device)
    model = ernie.ErnieModel(config_of(source), dtype=dtype, device=device)
    model.init_weights(seed=run.training.seed)
    model.tokenizer = Tokenizer.from_folder(source)
    return model


def _read_frozen(run: Run, device: str) -> ernie.ErnieModel:
    """A model whose projections are brought into few bits, block by block as they are read, and
    whose adapters are put beside them, as PiSSA needs the weights for its own.
    """
    path = run.model.model_name_or_path
    if not run.model.continue_training:
        model = _new_model(run, device)
        add_lora(model, lora_of(run), seed=run.training.seed, freeze=freezer(run))
        return model
    folder = resolve(path)
    config = ErnieConfig.from_folder(folder)
    if "quantization_config" in config.extra:
        raise ConfigError(
            f"{folder} is quantised already; compute_type={run.model.compute_type} needs the model "
            "that it was made from"
        )
    plain = ernie.ErnieModel(config, device="meta")
    prepare = Preparation(
        lora_of(run), weight_names(plain), seed=run.training.seed, freeze=freezer(run)
    )
    model = ernie.load(folder, dtype=weights_dtype(run, device), device=device, swap_block=prepare)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(TRAINED))
    return model


def freezer(run: Run) -> Freeze:
    """What brings frozen weights into the form of `compute_type`."""
    forms = FROZEN[run.model.compute_type]
    double = run.model.qlora_weight_double_quant

    def freeze(weight: Tensor, kind: str) -> QuantTensor:
        form = getattr(forms, kind)
        if form == "nf4":
            return kernels.quantize_nf4(weight, double=double)
        return kernels.quantize(weight, int(form.removeprefix("int")))

    return freeze


def frozen_form(run: Run, weight: str) -> str | None:
    """The format (`kernels.weights.quantized_bytes`) of a frozen projection, None for its dtype."""
    if run.model.compute_type == "bf16" or not run.is_lora:
        return None
    forms = FROZEN[run.model.compute_type]
    form = forms.experts if re.search(r"\.mlp\.(vision_)?experts\.", weight) else forms.dense
    return f"{form}_double" if run.model.qlora_weight_double_quant else form


def lora_of(run: Run) -> LoRA:
    m = run.model
    return LoRA(
        m.lora_rank, m.lora_alpha, m.rslora, m.use_dora, m.pissa, tuple(m.lora_target_modules)
    )


def load_adapter(model: ernie.ErnieModel, run: Run, folder: Path) -> None:
    """The trained parts of a model from a checkpoint, or from any adapter of the run's form."""
    name = run.model.model_name_or_path
    saved, tensors = lora_files.read_adapter(folder, model.config, name)
    wanted = lora_of(run)
    if saved != wanted:
        told = ", ".join(
            f"{key} {getattr(saved, name)} (this run: {getattr(wanted, name)})"
            for key, name in (
                ("lora_rank", "rank"),
                ("lora_alpha", "alpha"),
                ("rslora", "is_rank_stabilised"),
                ("use_dora", "has_magnitude"),
                ("pissa", "is_principal"),
            )
            if getattr(saved, name) != getattr(wanted, name)
        )
        raise ConfigError(
            f"the adapter in {folder} has {told}: give the same, or another output_dir"
        )
    lora_files.load_adapter(model, tensors, str(folder / lora_files.ADAPTER_FILE))
    if run.stage.has_reward_head and has_head(folder):
        fill_head(model, folder)


def num_groups(run: Run) -> int:
    """Groups of experts that the orthogonality loss looks at one by one; raises ConfigError where
    they are of different sizes.
    """
    if not run.model.moe_group_orthogonal_loss:
        return 1
    config = config_of(str(resolve(run.model.model_name_or_path)))
    if not config.moe_k or config.experts_per_bank[0] % config.moe_k:
        raise ConfigError(
            f"moe_group_orthogonal_loss divides experts into moe_k={config.moe_k} groups, but "
            f"there are {config.moe_num_experts}; leave it out"
        )
    return config.moe_k


def _choose_trained(model: ernie.ErnieModel, run: Run) -> None:
    """Everything but prediction blocks that are not asked for, and what is to be frozen."""
    depth, wanted = len(model.model.mtp), run.model.num_nextn_predict_layers
    if wanted not in (0, depth):
        raise ConfigError(
            f"num_nextn_predict_layers={wanted}, but the model has {depth} such blocks; give 0"
            + (f" or {depth}" if depth else "")
        )
    model.model.mtp.requires_grad_(bool(wanted))
    for name in still(dict(model.named_parameters()), run):
        model.get_parameter(name).requires_grad_(False)
    if not trained_parameters(model):
        words = (*run.model.freeze_parameters, *run.model.freeze_config)
        raise ConfigError(f"freezing {', '.join(words)} leaves nothing to train")


_PARTS = {
    "router": ("*.mlp.gate.*", "*.mlp.vision_gate.*"),
    "experts": ("*.mlp.experts.*", "*.mlp.vision_experts.*"),
    "shared_experts": ("*.shared_experts.*",),
    "embeddings": ("model.embed_tokens.*", "lm_head.*"),
    "attention": ("*.self_attn.*",),
    "vision_tower": ("vision_model.*",),
    "resampler": ("model.resampler_model.*",),
}


def still(names: Collection[str], run: Run) -> set[str]:
    """The parameters that full training leaves as they are, by `freeze_parameters` and
    `freeze_config`.
    """
    found = frozen(names, run.model.freeze_parameters)
    words = run.model.freeze_config
    if words and not any(name.startswith("vision_model.") for name in names):
        raise ConfigError(
            f"freeze_config={' '.join(words)} is about multimodal models; this one reads text "
            "alone: use freeze_parameters"
        )
    if "freeze_vision" in words:
        found |= {name for name in names if name.startswith("vision_model.")}
    if "freeze_lm" in words:
        trained = ("vision_model.", "model.resampler_model.")
        found |= {
            name for name in names if not name.startswith(trained) and not _VISION_BANK.search(name)
        }
    return found


_VISION_BANK = re.compile(r"\.mlp\.vision_(gate|experts)\.")


def frozen(names: Collection[str], wanted: Sequence[str]) -> set[str]:
    """The parameters that words of `freeze_parameters` mean; raises ConfigError for a word that
    means none.
    """
    found: set[str] = set()
    for word in wanted:
        meant = {n for pattern in _PARTS.get(word, (word,)) for n in names if fnmatch(n, pattern)}
        if not meant:
            raise ConfigError(
                f"freeze_parameters={word} means no parameter of this model; use "
                f"{', '.join(_PARTS)}, or a pattern of names such as model.layers.0.*"
            )
        found |= meant
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
