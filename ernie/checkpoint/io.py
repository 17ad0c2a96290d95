"""Loading and saving a model: a folder with `config.json`, safetensors files and a tokenizer.

`load` checks headers first, then fills a model that was built without memory, one tensor at a time;
`save` writes tensors as they are converted. Both need the weights once, plus one chunk or tensor;
`load` needs less where each block is swapped for something smaller as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ernie.checkpoint import convert
from ernie.checkpoint.folder import CheckpointError, Stored, read_folder
from ernie.checkpoint.hub import resolve
from ernie.checkpoint.layouts import LAYOUTS, MTP_MARK, Layout, layouts_of
from ernie.checkpoint.writer import write_folder
from ernie.config import ErnieConfig
from ernie.kernels.weights import QuantTensor
from ernie.model import Block, ErnieModel

if TYPE_CHECKING:
    from ernie.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9


def load(
    path_or_name: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    keep_integers: bool = False,
    swap_block: Callable[[nn.Module], nn.Module] | None = None,
) -> ErnieModel:
    """A model with its weights, from a folder in any known layout or from a name on the hub.

    Weights are converted to `dtype` (None: as the embedding is stored); routers stay float32.
    Those of a quantised folder become what their integers stand for, or, with `keep_integers`,
    QuantTensors, which `ernie.fused.fuse` understands and a plain forward pass does not. What
    `swap_block` makes of a block takes its place before the next block is read.
    `tokenizer` and `generation_config` are set where the folder has them. Raises CheckpointError
    or ConfigError, before anything large is read unless a value itself is bad.
    """
    folder = resolve(path_or_name)
    config = _readable_config(folder)
    if "quantization_config" in config.extra:
        from ernie.checkpoint.quantized import dequantize, read_quantized

        assert keep_integers or not swap_block, "blocks are swapped before they are dequantised"
        tokenizer = _tokenizer(folder, config)
        plain = None if keep_integers else dtype
        model = read_quantized(folder, config, device, swap_block, plain)
        if not keep_integers:
            dequantize(model, dtype or model.model.embed_tokens.weight.dtype)
        model.tokenizer, model.generation_config = tokenizer, _generation_config(folder)
    else:
        model, weights = open_weights(folder, dtype, device)
        fill(model, weights, swap_block)
    return model


def open_weights(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[ErnieModel, Iterator[tuple[str, Tensor]]]:
    """A model of which all but the weights is there, and its weights as they are read.

    Parameters are on the meta device; the iterator gives (name, tensor) in their order, one unit of
    the layout at a time. `dtype` as for `load`. Raises CheckpointError or ConfigError.
    """
    config = _readable_config(folder)
    if "quantization_config" in config.extra:
        raise CheckpointError(f"{folder} is quantised; give the model that it was made from")
    tokenizer = _tokenizer(folder, config)
    config, tensors = _agree_on_mtp(config, read_folder(folder))
    config = _agree_on_heads(folder, config, tensors)
    model = ErnieModel(config, dtype=dtype or stored_dtype(tensors), device="meta")
    model.tokenizer, model.generation_config = tokenizer, _generation_config(folder)
    template = dict(model.named_parameters())
    model.layout, weights = stored_weights(folder, tensors, template, device)
    return model, weights


def stored_weights(
    folder: Path,
    tensors: Mapping[str, Stored],
    template: Mapping[str, Tensor],
    device: torch.device | str,
    layouts: Iterable[Layout] | None = None,
) -> tuple[str, Iterator[tuple[str, Tensor]]]:
    """The layout of a folder, and its tensors by their native names, as `template` wants them.

    Raises CheckpointError where names, shapes or kinds do not fit.
    """
    layout, units = convert.detect(folder, tensors, template, layouts)
    log.info("%s: %d tensors in layout %r", folder, len(tensors), layout.name)
    return layout.name, convert.native_tensors(units, tensors, template, device)


def save(
    model: ErnieModel,
    path: str | Path,
    layout: str = "pt",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model in the layout "pt", "paddle" or "transformers", with its tokenizer.

    One file up to `max_shard_bytes`, numbered files with an index above. An interrupted save
    leaves no folder that loads as something else. Raises CheckpointError for an unknown layout or
    a parameter that the layout has no place for.
    """
    parameters = dict(model.named_parameters())
    write(
        path,
        model.config,
        parameters,
        parameters.__getitem__,
        layout=layout,
        tokenizer=model.tokenizer,
        generation_config=model.generation_config,
        max_shard_bytes=max_shard_bytes,
    )


def write(
    path: str | Path,
    config: ErnieConfig,
    template: Mapping[str, Tensor],
    native: Callable[[str], Tensor],
    *,
    layout: str | Layout,
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save` for a model that need not exist as a whole.

    `template` gives names, shapes and dtypes of the parameters; `native` makes each tensor when its
    turn comes. `texts` are further files, content by name.
    """
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    table = layouts_of(template)[layout] if isinstance(layout, str) else layout
    units = convert.plan(template, table)
    dtype = str(template["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    files = {**(texts or {}), "config.json": as_json(_config_dict(config, table, dtype))}
    if generation_config is not None:
        files["generation_config.json"] = as_json(generation_config)
    write_folder(
        path,
        convert.planned(units, template),
        convert.stored_tensors(units, native),
        texts=files,
        copy_files=tokenizer.save if tokenizer else None,
        max_shard_bytes=max_shard_bytes,
    )


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _config_dict(config: ErnieConfig, table: Layout, dtype: str) -> dict[str, Any]:
    whole = config.to_nested_dict() if table.is_nested else config.to_dict()
    # auto_map names Python files, which are never written here.
    dropped = ("dtype", "torch_dtype", "auto_map")
    return {**{k: v for k, v in whole.items() if k not in dropped}, table.dtype_key: dtype}


def _readable_config(folder: Path) -> ErnieConfig:
    config = ErnieConfig.from_folder(folder)
    if "auto_map" in config.extra:
        log.info("%s: auto_map names code of the folder, which is never run", folder)
    return config


def _agree_on_mtp(
    config: ErnieConfig, tensors: dict[str, Stored]
) -> tuple[ErnieConfig, dict[str, Stored]]:
    """Other programs drop the multi-token-prediction block, or its count in config.json."""
    block = {name for name in tensors if MTP_MARK in name}
    depth = config.num_nextn_predict_layers
    if depth and not block:
        log.warning(
            "config.json says num_nextn_predict_layers=%d but the files hold no such block: "
            "loaded without multi-token prediction",
            depth,
        )
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    if block and not depth:
        log.warning(
            "%d tensors of a multi-token-prediction block (%s, ...) are left out: config.json does "
            "not say num_nextn_predict_layers",
            len(block),
            min(block),
        )
        tensors = {name: stored for name, stored in tensors.items() if name not in block}
    return config, tensors


def _agree_on_heads(
    folder: Path, config: ErnieConfig, tensors: Mapping[str, Stored]
) -> ErnieConfig:
    """Some config.json leave out head_dim where it is not hidden_size / num_attention_heads: then
    the projections say it, in whichever layout.
    """
    raw = json.loads((folder / "config.json").read_bytes())
    nested = raw.get("text_config")
    if (nested if isinstance(nested, dict) else raw).get("head_dim") is not None:
        return config
    heads, both = config.num_attention_heads, 2 * config.num_key_value_heads
    for name, stored in tensors.items():
        for leaf, num_heads in (("q_proj", heads), ("qkv_proj", heads + both)):
            if name.endswith(f"layers.0.self_attn.{leaf}.weight"):
                size = math.prod(stored.shape) // config.hidden_size // num_heads
                return dataclasses.replace(config, head_dim=size)
    return config


def stored_dtype(tensors: Mapping[str, Stored]) -> torch.dtype:
    found = (s.dtype for name, s in tensors.items() if name.endswith(".embed_tokens.weight"))
    return next(found, torch.bfloat16)


def _tokenizer(folder: Path, config: ErnieConfig) -> Tokenizer | None:
    from ernie.tokenizer import Tokenizer

    if not Tokenizer.exists(folder):
        return None
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, but config.json "
            f"says vocab_size={config.vocab_size}; it belongs to another model"
        )
    return tokenizer


def _generation_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; it must hold an object")
    return value


def fill(
    model: ErnieModel,
    weights: Iterable[tuple[str, Tensor | QuantTensor]],
    swap_block: Callable[[nn.Module], nn.Module] | None,
) -> None:
    """Give a model its weights, by name; see `load` for `swap_block`."""
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, Block)]
    home_by_name = {n: path for path, block in blocks for n, _ in block.named_parameters(path)}
    num_missing = Counter(home_by_name.values())
    for name, weight in weights:
        _place(model, name, weight)
        home = home_by_name.get(name, "")
        num_missing[home] -= 1
        if swap_block and home and not num_missing[home]:
            model.set_submodule(home, swap_block(model.get_submodule(home)))


def _place(model: nn.Module, name: str, weight: Tensor | QuantTensor) -> None:
    home, _, leaf = name.rpartition(".")
    module = model.get_submodule(home)
    trained = getattr(module, leaf).requires_grad
    if isinstance(weight, Tensor):
        setattr(module, leaf, nn.Parameter(weight, requires_grad=trained))
    else:
        delattr(module, leaf)  # a parameter; what takes its place is none
        setattr(module, leaf, weight)
