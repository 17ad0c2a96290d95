"""Folders whose weights are integers: written once, so that no start of a server quantises again.

The folder is one of the layout `pt` whose `config.json` has a `quantization_config` with our
`quant_method`; a quantised weight keeps its name for the integers and has its scales beside it (see
`layouts.QUANTIZED` and `ernie.kernels.weights`). A tied head is written apart, because the
embedding table stays as it is.

    write_quantized(source, target, scheme)     quantise, one tensor at a time
    read_quantized(folder)                      a model with QuantTensors, for `ernie.fused.fuse`
    ernie.load(folder)                          a plain model of the values they stand for
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.checkpoint import io
from ernie.checkpoint.folder import CheckpointError, read_folder
from ernie.checkpoint.hub import resolve
from ernie.checkpoint.layouts import QUANTIZED, QUANTIZED_VL, SCALES, Layout
from ernie.config import ErnieConfig
from ernie.kernels.weights import GROUP_SIZE, QuantTensor
from ernie.model import ErnieModel
from ernie.quant.scheme import Scheme, read_scheme

METHOD = "ernie"  # `quant_method` of folders written here; other programs keep integers elsewhere


def write_quantized(source: str | Path, target: str | Path, quantization: str) -> None:
    """Quantise the checkpoint `source` into the folder `target`; the source is held in memory.

    `quantization` is a name or a JSON object, see `ernie.quant.scheme`. Raises ConfigError for
    another one, CheckpointError for a source that is quantised already.
    """
    if "quantization_config" in ErnieConfig.from_folder(resolve(source)).extra:
        raise CheckpointError(f"{source} is quantised already; give the model it was made from")
    model = io.load(source, dtype=None)
    scheme = read_scheme(quantization, has_experts=model.config.is_moe)
    if scheme is None:
        raise CheckpointError("quantization=none leaves nothing to do; name a scheme")
    described = {"quant_method": METHOD, **dataclasses.asdict(scheme)}
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings=False,
        extra={**model.config.extra, "quantization_config": described},
    )
    plain = dict(model.named_parameters()) | {"lm_head.weight": model.head_weight}
    dtype = model.model.embed_tokens.weight.dtype
    io.write(
        target,
        config,
        _template(config, scheme, dtype),
        _Native(plain, scheme),
        layout=_layout(model.config),
        tokenizer=model.tokenizer,
        generation_config=model.generation_config,
    )


def read_quantized(
    folder: Path,
    config: ErnieConfig,
    device: torch.device | str = "cpu",
    swap_block: Callable[[nn.Module], nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> ErnieModel:
    """A model in whose plain blocks QuantTensors stand for quantised weights; the others are in
    `dtype`, or as the embedding is stored. `swap_block` is that of `ernie.load`.
    """
    scheme = scheme_of(config, folder)
    tensors = read_folder(folder)
    dtype = dtype or io.stored_dtype(tensors)
    model = ErnieModel(config, dtype=dtype, device="meta")
    template = _template(config, scheme, dtype)
    _, weights = io.stored_weights(folder, tensors, template, device, [_layout(config)])
    widths = {name: plain.shape[-1] for name, plain in model.named_parameters()}
    io.fill(model, _joined(weights, widths, scheme), swap_block)
    return model


def _joined(
    weights: Iterable[tuple[str, Tensor]], width_by_name: Mapping[str, int], scheme: Scheme
) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Tensors as they come; the parts of a quantised weight as one, with the last of them."""
    parts: dict[str, Tensor] = {}
    for part_name, tensor in weights:
        name = part_name
        for suffix in reversed(SCALES):  # the first one ends the second
            name = name.removesuffix(suffix)
        bits = _bits(name, scheme)
        if bits is None:
            yield name, tensor
            continue
        parts[part_name] = tensor
        wanted = [name, *(name + suffix for suffix in SCALES[: 1 if bits == 8 else 2])]
        if all(part in parts for part in wanted):
            data, scale, *group = (parts.pop(part) for part in wanted)
            group_scale = group[0] if group else None
            yield name, QuantTensor(bits, data, scale, group_scale, width_by_name[name])


def dequantize(model: ErnieModel, dtype: torch.dtype) -> ErnieModel:
    """Plain parameters in place of the QuantTensors of `model`, in `dtype`; its config is then that
    of a plain model.
    """
    for name in [name for name, _ in _integers(model)]:
        home, _, leaf = name.rpartition(".")
        module = model.get_submodule(home)
        weight = getattr(module, leaf)
        delattr(module, leaf)
        setattr(module, leaf, nn.Parameter(weight.dequantized(dtype)))
    extra = {k: v for k, v in model.config.extra.items() if k != "quantization_config"}
    model.config = dataclasses.replace(model.config, extra=extra)
    return model


def scheme_of(config: ErnieConfig, folder: Path) -> Scheme:
    """The scheme of a folder's `quantization_config`. Raises CheckpointError for a foreign one."""
    given: dict[str, Any] = dict(config.extra["quantization_config"])
    given.setdefault("vision_experts", given.get("experts"))  # as folders once said it
    names = {field.name for field in dataclasses.fields(Scheme)}
    if given.pop("quant_method", None) != METHOD or set(given) != names:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config that another program wrote; load "
            "the unquantised model and quantise it with `erniekit quantize` or when serving"
        )
    return Scheme(**given)


def _layout(config: ErnieConfig) -> Layout:
    return QUANTIZED_VL if config.vision_config else QUANTIZED


class _Native:
    """Native tensors by name, made when they are asked for; the parts of a weight follow it."""

    def __init__(self, plain: Mapping[str, Tensor], scheme: Scheme) -> None:
        self.plain, self.scheme = plain, scheme
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name in self.made:
            return self.made.pop(name)
        bits = _bits(name, self.scheme)
        if bits is None:
            return self.plain[name]
        quantised = kernels.quantize(self.plain[name].detach(), bits)
        parts = (quantised.channel_scale, quantised.group_scale)
        self.made |= {name + s: part for s, part in zip(SCALES, parts) if part is not None}
        return quantised.data


def _template(config: ErnieConfig, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shapes and dtypes of what a folder holds, by native name, on the meta device."""
    template: dict[str, Tensor] = {}
    for name, plain in ErnieModel(config, dtype=dtype, device="meta").named_parameters():
        bits = _bits(name, scheme)
        if bits is None:
            template[name] = plain
            continue
        *outer, width = plain.shape
        data = (*outer, -(-width // 2)) if bits == 4 else (*outer, width)
        kind = torch.uint8 if bits == 4 else torch.int8
        template[name] = torch.empty(data, dtype=kind, device="meta")
        template[name + SCALES[0]] = torch.empty(outer, device="meta")
        if bits != 8:
            groups = (*outer, -(-width // GROUP_SIZE))
            template[name + SCALES[1]] = torch.empty(groups, dtype=torch.int8, device="meta")
    return template


def _bits(name: str, scheme: Scheme) -> int | None:
    """Bits of the parameter `name`, None where it keeps its values."""
    if name == "lm_head.weight":
        return scheme.head
    if ".mlp.experts." in name:
        return scheme.experts
    if ".mlp.vision_experts." in name:
        return scheme.vision_experts
    is_product = name.endswith("_proj.weight") and not name.endswith("linear_proj.weight")
    return scheme.dense if is_product else None


def _integers(model: ErnieModel) -> Iterable[tuple[str, QuantTensor]]:
    for home, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, QuantTensor):
                yield f"{home}.{leaf}", value
