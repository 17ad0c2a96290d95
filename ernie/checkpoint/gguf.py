"""A GGUF file of a Llama-shaped model, turned into an ERNIE 4.5 checkpoint with its tokenizer.

A Llama is the dense ERNIE network with other sizes, and GGUF keeps the query and key rows in the
order for *interleaved* rotary embedding, which is ERNIE's: tensors are only de-quantised and
renamed. Whatever the file says about the network beyond that (biases, rotary scaling, windows,
experts) has no place there and is refused, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.gguf_names import DENSE_ARCHITECTURE, FIELDS, TENSORS, TOKEN_IDS
from ernie.checkpoint.gguf_tokenizer import tokenizer_files
from ernie.checkpoint.io import write
from ernie.config import ErnieConfig
from ernie.model import ErnieModel

ARCHITECTURES = ("llama", DENSE_ARCHITECTURE)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Understood as well: these must agree with the sizes above.
_CHECKED = ("attention.value_length", "rope.dimension_count", "vocab_size")


_NEEDED = (
    "embedding_length",
    "block_count",
    "attention.head_count",
    "feed_forward_length",
    "attention.layer_norm_rms_epsilon",
)
_IDS = ("bos", "eos", "padding")


def import_gguf(
    source: str | Path, output: str | Path, *, layout: str = "pt", dtype: str = "bfloat16"
) -> None:
    """Write the model and tokenizer of the GGUF file `source` as a checkpoint folder `output`.

    `dtype` is that of the weights written ("bfloat16", "float16", "float32"); one tensor is in
    memory at a time. Raises CheckpointError for a file that is no GGUF, for another architecture,
    and for anything in it that an ERNIE 4.5 network or a `tokenizer.json` cannot express.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    reader = _open(Path(source))
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {_native_name(t.name, source): t for t in reader.tensors}
    config = _config(meta, tensors, source)
    template = dict(ErnieModel(config, dtype=DTYPES[dtype], device="meta").named_parameters())
    _check(template, tensors, source)
    write(
        output,
        config,
        template,
        lambda name: _dequantised(tensors[name], template[name].dtype, source),
        layout=layout,
        generation_config=_generation_config(meta),
        texts=tokenizer_files(meta, source),
    )


def _open(source: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise CheckpointError(
            "reading GGUF files needs the package gguf, which is not installed; pip install gguf"
        ) from None
    if not source.is_file():
        raise CheckpointError(f"there is no file {source}; give the path of a .gguf file")
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{source} cannot be read as GGUF ({error}); it is another format or truncated"
        ) from None


def _native_name(name: str, source: str | Path) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    pattern = TENSORS.get(f"blk.{{i}}.{match[2]}" if match else name)
    if pattern is None:
        raise CheckpointError(
            f"tensor {name} of {source} has no place in an ERNIE 4.5 dense network; only plain "
            "Llama models without biases, rotary scaling or experts can be imported"
        )
    return pattern.format(i=match[1] if match else "")


def _config(meta: Mapping[str, Any], tensors: Mapping[str, Any], source: str | Path) -> ErnieConfig:
    kind = meta.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{source} holds a model of architecture {kind!r}; only "
            f"{' and '.join(ARCHITECTURES)} can be imported"
        )
    said = {k.removeprefix(f"{kind}."): v for k, v in meta.items() if k.startswith(f"{kind}.")}
    _refuse_features(kind, said, source)
    lacking = [f"{kind}.{key}" for key in _NEEDED if key not in said]
    lacking += ["token_embd.weight"] if "model.embed_tokens.weight" not in tensors else []
    if lacking:
        raise CheckpointError(f"{source} lacks {lacking[0]}; write the file anew")
    sizes: dict[str, Any] = {ours: said[key] for key, ours in FIELDS.items() if key in said}
    heads = sizes["num_attention_heads"]
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", said.get("rope.dimension_count", sizes["hidden_size"] // heads))
    sizes.setdefault("rope_theta", 10000.0)
    # Stored as float32: 9.99999974e-06 was written for 1e-05.
    for name in ("rms_norm_eps", "rope_theta"):
        sizes[name] = float(f"{sizes[name]:.6g}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, sizes["head_dim"]) != sizes["head_dim"]:
            raise CheckpointError(
                f"{source} says {kind}.{key} = {said[key]} beside heads of {sizes['head_dim']}; "
                "heads must be rotated as a whole and equally wide"
            )
    sizes["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[1])
    sizes["tie_word_embeddings"] = "lm_head.weight" not in tensors
    sizes |= {f"{TOKEN_IDS[key]}_token_id": None for key in _IDS} | _generation_config(meta)
    if isinstance(sizes["eos_token_id"], list):
        sizes["eos_token_id"] = tuple(sizes["eos_token_id"])
    return ErnieConfig(**sizes)


def _refuse_features(kind: str, said: Mapping[str, Any], source: str | Path) -> None:
    for key, value in said.items():
        # Zero, false and "none" say that a feature is not used.
        if key not in (*FIELDS, *_CHECKED) and value not in (0, False, "none"):
            raise CheckpointError(
                f"{source} says {kind}.{key} = {value!r}, which an ERNIE 4.5 dense network cannot "
                "express; import another model"
            )


def _check(template: Mapping[str, Tensor], tensors: Mapping[str, Any], source: str | Path) -> None:
    for name in sorted(template.keys() | tensors.keys()):
        wanted = tuple(template[name].shape) if name in template else None
        found = tuple(int(n) for n in tensors[name].shape[::-1]) if name in tensors else None
        if wanted != found:
            raise CheckpointError(
                f"the tensor for {name} in {source} is {found}, but the file's sizes ask for "
                f"{wanted}; write the file anew"
            )


def _dequantised(tensor: Any, dtype: torch.dtype, source: str | Path) -> Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise CheckpointError(
            f"tensor {tensor.name} of {source} is quantised as {tensor.tensor_type.name}, which "
            "the package gguf cannot undo; take a Q4, Q5, Q6, Q8 or F16 file"
        ) from None
    value = torch.tensor(values).view(*(int(n) for n in tensor.shape[::-1])).to(dtype)
    if not all(extreme.isfinite() for extreme in value.aminmax()):
        raise CheckpointError(
            f"tensor {tensor.name} of {source} holds NaN, Inf or a number beyond {dtype}"
        )
    return value


def _generation_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    keys = {f"{TOKEN_IDS[key]}_token_id": f"tokenizer.ggml.{key}_token_id" for key in _IDS}
    found = {ours: meta[theirs] for ours, theirs in keys.items() if theirs in meta}
    turn_end = meta.get("tokenizer.ggml.eot_token_id")
    if turn_end is not None and turn_end != found.get("eos_token_id", turn_end):
        found["eos_token_id"] = [found["eos_token_id"], turn_end]
    return found
