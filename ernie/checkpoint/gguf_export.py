"""A model folder written as one GGUF file, which llama.cpp loads: dense and mixture of experts.

    folder: headers -> config -> metadata, tokenizer -> tensors, one parameter in memory at a time

Norms, routers and correction biases stay float32. Weights are float32, float16 or bfloat16, or
blocks of 32 along a row with one float16 scale: "q8_0" (8 bits) and "q4_0" (4 bits; the projection
to the vocabulary keeps 8, since its errors are errors of the logits). llama.cpp has no place for
biases, a second period of MoE layers and images: refused. It has none for multi-token prediction
either: those blocks are left out, with a warning, since the model answers the same without them.
Where the chosen experts' probabilities sum to less than 6.1e-5, llama.cpp divides by that instead.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie.checkpoint import convert
from ernie.checkpoint.folder import CheckpointError, Stored, read_folder
from ernie.checkpoint.gguf_names import (
    DENSE_ARCHITECTURE,
    FIELDS,
    MOE_ARCHITECTURE,
    MOE_TENSORS,
    TENSORS,
)
from ernie.checkpoint.gguf_tokenizer import write_tokenizer
from ernie.checkpoint.hub import resolve
from ernie.checkpoint.layouts import MTP_MARK
from ernie.checkpoint.writer import as_bytes
from ernie.config import ErnieConfig
from ernie.model import KEPT_FLOAT32, ErnieModel

log = logging.getLogger(__name__)

# Our name -> GGUF's name of the tensor type, and of the file type.
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_gguf(source: str | Path, target: str | Path, *, dtype: str = "f16") -> None:
    """Write the model of the folder (or hub name) `source` as the GGUF file `target`.

    `dtype` is that of the weights, a key of `DTYPES`. The file appears whole or not at all. Raises
    CheckpointError for what llama.cpp cannot compute and for values that `dtype` cannot hold.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    folder, target = resolve(source), Path(target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; give the path of the .gguf file to write")
    config, stored = _read(folder)
    template = dict(ErnieModel(config, dtype=torch.float32, device="meta").named_parameters())
    _, units = convert.detect(folder, stored, template)
    names = [name for unit in units for name in unit.native]
    parts = {name: _parts(name, template[name].shape, dtype) for name in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as hidden:
        writer = _writer(Path(hidden) / target.name, config, folder, dtype)
        for part in (part for name in names for part in parts[name]):
            writer.add_tensor_info(part.name, part.shape, np.float32, part.num_bytes, part.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in convert.native_tensors(units, stored, template):
            for part, rows in zip(parts[name], _cut(tensor, parts[name])):
                writer.write_tensor_data(part.encoded(rows))
        writer.close()
        os.replace(Path(hidden) / target.name, target)


def _read(folder: Path) -> tuple[ErnieConfig, dict[str, Stored]]:
    """What llama.cpp computes of the folder: its config without MTP, and the tensors that needs."""
    config, stored = ErnieConfig.from_folder(folder), read_folder(folder)
    if "quantization_config" in config.extra:
        raise CheckpointError(f"{folder} is quantised already; export the unquantised model")
    last = config.num_hidden_layers - 1
    experts_end = np.max(config.moe_layer_end_index)
    for wrong, what in (
        (config.vision_config, "a vision tower"),
        (config.use_bias, "use_bias=true"),
        (config.is_moe and config.moe_layer_interval != 1, "moe_layer_interval above 1"),
        (config.is_moe and -1 < experts_end < last, "dense layers after the MoE layers"),
    ):
        if wrong:
            raise CheckpointError(
                f"{folder} has {what}, which llama.cpp does not compute for this family; export "
                "a text model without"
            )
    left_out = [name for name in stored if MTP_MARK in name]
    if left_out:
        log.warning(
            "%d tensors of the multi-token-prediction block are left out: llama.cpp has no place "
            "for them; answers do not change",
            len(left_out),
        )
    kept = {name: entry for name, entry in stored.items() if name not in left_out}
    return replace(config, num_nextn_predict_layers=0), kept


def _writer(path: Path, config: ErnieConfig, folder: Path, dtype: str) -> Any:
    """A GGUFWriter with all metadata."""
    import gguf

    arch = MOE_ARCHITECTURE if config.is_moe else DENSE_ARCHITECTURE
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, field in FIELDS.items():
        # A config.json may spell these two without a point.
        add = writer.add_float32 if field in ("rope_theta", "rms_norm_eps") else writer.add_uint32
        add(f"{arch}.{key}", getattr(config, field))
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.is_moe:
        assert config.moe_k is not None
        writer.add_expert_count(config.experts_per_bank[0])
        writer.add_expert_used_count(config.moe_k)
        writer.add_expert_feed_forward_length(config.expert_sizes[0])
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(int(np.min(config.moe_layer_start_index)))
        if config.shared_size:
            writer.add_expert_shared_count(config.moe_num_shared_experts)
            writer.add_expert_shared_feed_forward_length(config.shared_size)
    write_tokenizer(writer, folder, config.vocab_size)
    _add_token_ids(writer, config)
    return writer


def _add_token_ids(writer: Any, config: ErnieConfig) -> None:
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    # The format has two ids that end an answer: the second ends a turn.
    for stop, add in zip(config.eos_token_ids, (writer.add_eos_token_id, writer.add_eot_token_id)):
        add(stop)
    if len(config.eos_token_ids) > 2:
        log.warning("of eos_token_id=%s only the first two are written", config.eos_token_ids)


# --- tensors ---


class _Part:
    """One GGUF tensor: its name, shape and type."""

    def __init__(self, name: str, shape: Sequence[int], kind: Any) -> None:
        import gguf

        self.name, self.shape, self.kind = name, tuple(shape), kind
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if self.shape[-1] % block:
            raise CheckpointError(
                f"the rows of {name} have {self.shape[-1]} numbers, which are no whole blocks of "
                f"{block} as {kind.name} has; use f16 or bf16"
            )
        self.num_bytes = int(np.prod(self.shape)) // block * block_bytes

    def encoded(self, rows: Tensor) -> np.ndarray:
        """The float32 tensor in this part's type, as it lies in the file."""
        from gguf.quants import quantize

        if self.kind.name not in _PLAIN:
            return quantize(rows.numpy(), self.kind)
        plain = rows.to(_PLAIN[self.kind.name])
        if not all(extreme.isfinite() for extreme in plain.aminmax()):
            raise CheckpointError(
                f"a number of {self.name} is beyond what {self.kind.name} can hold; use bf16 or f32"
            )
        return as_bytes(plain).numpy()


def _parts(name: str, shape: Sequence[int], dtype: str) -> list[_Part]:
    """The GGUF tensors of one parameter."""
    import gguf

    layer = re.search(r"\d+", name)
    pattern = name if layer is None else name.replace(layer[0], "{i}", 1)
    targets = _NAMES[pattern]
    kept = len(shape) == 1 or name.endswith(KEPT_FLOAT32)
    is_head = pattern in ("model.embed_tokens.weight", "lm_head.weight")
    wanted = "f32" if kept else "q8_0" if is_head and dtype == "q4_0" else dtype
    kind = gguf.GGMLQuantizationType[DTYPES[wanted][0]]
    if name.endswith("e_score_correction_bias"):
        shape = shape[1:]  # (banks, E) of one bank
    part = (*shape[:-2], shape[-2] // len(targets), shape[-1]) if len(shape) > 1 else shape
    return [_Part(target.format(i=layer and layer[0]), part, kind) for target in targets]


_NAMES: dict[str, tuple[str, ...]] = {
    **{native: (stored,) for stored, native in TENSORS.items()},
    **{native: stored for stored, native in MOE_TENSORS.items()},
}


def _cut(tensor: Tensor, parts: Sequence[_Part]) -> Iterator[Tensor]:
    tensor = tensor.detach()
    if len(parts) == 1:
        yield tensor.reshape(parts[0].shape)
    else:
        yield from tensor.chunk(len(parts), dim=-2)
