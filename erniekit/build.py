"""The model of a run: read or made anew, with adapters, and with recomputation where wanted.

Also what a configuration looks like for a hub name without reading anything, which lets every
example file be checked on the meta device.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

import ernie
from ernie import kernels
from ernie.checkpoint.hub import resolve
from ernie.config import ErnieConfig
from ernie.models import MODELS, TINY
from ernie.settings import ConfigError, did_you_mean
from ernie.tokenizer import Tokenizer
from erniekit.config import Run
from erniekit.lora import LoRA, add_lora
from erniekit.recompute import recompute
from erniekit.reward_model import add_reward_head, fill_head, has_head

log = logging.getLogger("erniekit")


def config_of(path_or_name: str) -> ErnieConfig:
    """The network of a folder, or of a released model by its hub name; nothing is fetched."""
    if Path(path_or_name).is_dir():
        return ErnieConfig.from_folder(path_or_name)
    name = path_or_name.rpartition("/")[2].removesuffix("-Paddle").removesuffix("-PT")
    if name in MODELS:
        return MODELS[name].config
    if name in TINY:
        return TINY[name]
    near = did_you_mean(name, MODELS)
    raise ConfigError(f"{path_or_name!r} is neither a folder nor a model of the family{near}")


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
    if model.config.vision_config:
        raise ConfigError(
            f"{run.model.model_name_or_path} reads images, which cannot be trained here; train one "
            "of the text models (0.3B, 21B-A3B, 300B-A47B)"
        )
    if run.is_lora:
        add_lora(model, lora_of(run), seed=run.training.seed)
    else:
        _choose_trained(model, run)
    if run.model.stage == "RM":
        add_reward_head(model, seed=run.training.seed)
        if has_head(folder := weights_from or Path(run.model.model_name_or_path)):
            fill_head(model, folder)
    granularity = run.model.recompute_granularity if run.model.recompute else None
    recompute(model, granularity, run.model.no_recompute_layers)
    return model


def choose_products(run: Run, device: str) -> None:
    """Have this process multiply as `cpu_products` says; raises ConfigError where it cannot."""
    try:
        kernels.bfloat16_products(device == "cpu" and run.model.cpu_products == "bfloat16")
    except ValueError as error:
        raise ConfigError(f"cpu_products=bfloat16: {error}") from None


def read_model(
    run: Run, device: str, weights_from: Path | None = None, *, in_host_memory: bool = False
) -> ernie.ErnieModel:
    """The base model of a run as it is on disk, or a new one with random weights."""
    source = weights_from or run.model.model_name_or_path
    if not source:
        raise ConfigError("model_name_or_path is not set; give a folder or a name on the hub")
    dtype = weights_dtype(run, device)
    device = "cpu" if in_host_memory else device
    if weights_from:
        # The tokenizer's files are copied at every save: not out of a checkpoint, which is removed.
        model = ernie.load(weights_from, dtype=dtype, device=device)
        model.tokenizer = Tokenizer.from_folder(resolve(run.model.model_name_or_path))
        return model
    if run.model.continue_training:
        return ernie.load(source, dtype=dtype, device=device)
    model = ernie.ErnieModel(config_of(str(source)), dtype=dtype, device=device)
    model.init_weights(seed=run.training.seed)
    model.tokenizer = Tokenizer.from_folder(source)
    return model


def lora_of(run: Run) -> LoRA:
    return LoRA(run.model.lora_rank, run.model.lora_alpha, run.model.rslora)


def _choose_trained(model: ernie.ErnieModel, run: Run) -> None:
    """Everything but prediction blocks that are not asked for."""
    depth, wanted = len(model.model.mtp), run.model.num_nextn_predict_layers
    if wanted not in (0, depth):
        raise ConfigError(
            f"num_nextn_predict_layers={wanted}, but the model has {depth} such blocks; give 0 or "
            f"{depth}"
        )
    model.model.mtp.requires_grad_(bool(wanted))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
