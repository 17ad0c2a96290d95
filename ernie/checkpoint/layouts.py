"""The published checkpoint layouts, as data. Reading a table is knowing the format.

A row relates what a file stores to what the model holds:

    the stored tensors, one under another  ==  the native tensors, one under another

With `transposed`, stored matrices are `[in, out]` and are turned first (vectors never are). Several
stored tensors are equal parts. `name[{e}]` is entry e of a stacked tensor: one row per expert.
Nothing but these rows is a tensor of the layout: names that fit no row are errors on either side.

    {root}   `model` or `ernie`, see `Layout.roots`     {i}   a number
    {block}  a transformer block, see `BLOCKS`          {e}   an expert
    {leaf}   `weight` or `bias`

Source: the published checkpoints; ERNIE's converter to PyTorch; what transformers 5 writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    stored: tuple[str, ...]
    native: tuple[str, ...]
    transposed: bool = False
    # A published file has this matrix the wrong way round: the shape in the file decides.
    either_way: bool = False


@dataclass(frozen=True)
class Layout:
    name: str
    roots: tuple[str, ...]  # accepted on load; the first is written
    rows: tuple[Row, ...]
    dtype_key: str  # how `config.json` calls the dtype of the weights


# Where a transformer block stands: (stored, native).
BLOCKS = (
    ("{root}.layers.{i}", "model.layers.{i}"),
    ("{root}.mtp_block.{i}", "model.mtp.{i}.block"),
)

# Stored names with this part belong to multi-token prediction, which a checkpoint may lack.
MTP_MARK = ".mtp_"


def _row(stored: str, native: str, **flags: bool) -> Row:
    return Row(tuple(stored.split(" + ")), tuple(native.split(" + ")), **flags)


# Vectors and the embedding are the same everywhere.
_COMMON = (
    _row("{root}.embed_tokens.weight", "model.embed_tokens.weight"),
    _row("{root}.norm.weight", "model.norm.weight"),
    _row("{block}.input_layernorm.weight", "{block}.input_layernorm.weight"),
    _row("{block}.post_attention_layernorm.weight", "{block}.post_attention_layernorm.weight"),
    _row("{root}.mtp_emb_norm.{i}.weight", "model.mtp.{i}.emb_norm.weight"),
    _row("{root}.mtp_hidden_norm.{i}.weight", "model.mtp.{i}.hidden_norm.weight"),
)

_CORRECTION_BIAS = _row(
    "{block}.mlp.moe_statics.e_score_correction_bias",
    "{block}.mlp.moe_statics.e_score_correction_bias",
)

# Matrices `[out, in]`, each projection apart.
_TORCH = (
    *_COMMON,
    _row("{block}.self_attn.q_proj.{leaf}", "{block}.self_attn.q_proj.{leaf}"),
    _row("{block}.self_attn.k_proj.{leaf}", "{block}.self_attn.k_proj.{leaf}"),
    _row("{block}.self_attn.v_proj.{leaf}", "{block}.self_attn.v_proj.{leaf}"),
    _row("{block}.self_attn.o_proj.{leaf}", "{block}.self_attn.o_proj.{leaf}"),
    _row("{block}.mlp.gate_proj.{leaf}", "{block}.mlp.gate_proj.{leaf}"),
    _row("{block}.mlp.up_proj.{leaf}", "{block}.mlp.up_proj.{leaf}"),
    _row("{block}.mlp.down_proj.{leaf}", "{block}.mlp.down_proj.{leaf}"),
    _row("{block}.mlp.gate.weight", "{block}.mlp.gate.weight"),
    _row(
        "{block}.mlp.shared_experts.gate_proj.{leaf}", "{block}.mlp.shared_experts.gate_proj.{leaf}"
    ),
    _row("{block}.mlp.shared_experts.up_proj.{leaf}", "{block}.mlp.shared_experts.up_proj.{leaf}"),
    _row(
        "{block}.mlp.shared_experts.down_proj.{leaf}", "{block}.mlp.shared_experts.down_proj.{leaf}"
    ),
    # 300B-A47B-PT was published with [2h, h] here.
    _row("{root}.mtp_linear_proj.{i}.weight", "model.mtp.{i}.linear_proj.weight", either_way=True),
    _row("lm_head.weight", "lm_head.weight"),
)

PT = Layout(
    name="pt",
    roots=("model",),
    dtype_key="torch_dtype",
    rows=(
        *_TORCH,
        _CORRECTION_BIAS,
        _row(
            "{block}.mlp.experts.{e}.gate_proj.weight + {block}.mlp.experts.{e}.up_proj.weight",
            "{block}.mlp.experts.gate_up_proj[{e}]",
        ),
        _row("{block}.mlp.experts.{e}.down_proj.weight", "{block}.mlp.experts.down_proj[{e}]"),
    ),
)

# transformers 5 in memory, and on disk when asked not to go back to the published form.
TRANSFORMERS = Layout(
    name="transformers",
    roots=("model",),
    dtype_key="dtype",
    rows=(
        *_TORCH,
        _row(
            "{block}.mlp.gate.moe_statics.e_score_correction_bias",
            "{block}.mlp.moe_statics.e_score_correction_bias",
        ),
        _row("{block}.mlp.experts.gate_up_proj", "{block}.mlp.experts.gate_up_proj"),
        _row("{block}.mlp.experts.down_proj", "{block}.mlp.experts.down_proj"),
    ),
)

# Matrices `[in, out]`; columns of qkv_proj are [q | k | v], of up_gate_proj [gate | up].
PADDLE = Layout(
    name="paddle",
    roots=("ernie", "model"),
    dtype_key="dtype",
    rows=(
        *_COMMON,
        _CORRECTION_BIAS,
        _row(
            "{block}.self_attn.qkv_proj.{leaf}",
            "{block}.self_attn.q_proj.{leaf} + {block}.self_attn.k_proj.{leaf}"
            " + {block}.self_attn.v_proj.{leaf}",
            transposed=True,
        ),
        _row("{block}.self_attn.o_proj.{leaf}", "{block}.self_attn.o_proj.{leaf}", transposed=True),
        _row(
            "{block}.mlp.up_gate_proj.{leaf}",
            "{block}.mlp.gate_proj.{leaf} + {block}.mlp.up_proj.{leaf}",
            transposed=True,
        ),
        _row("{block}.mlp.down_proj.{leaf}", "{block}.mlp.down_proj.{leaf}", transposed=True),
        _row("{block}.mlp.gate.weight", "{block}.mlp.gate.weight", transposed=True),
        _row(
            "{block}.mlp.experts.{e}.up_gate_proj.weight",
            "{block}.mlp.experts.gate_up_proj[{e}]",
            transposed=True,
        ),
        _row(
            "{block}.mlp.experts.{e}.down_proj.weight",
            "{block}.mlp.experts.down_proj[{e}]",
            transposed=True,
        ),
        _row(
            "{block}.mlp.shared_experts.up_gate_proj.{leaf}",
            "{block}.mlp.shared_experts.gate_proj.{leaf}"
            " + {block}.mlp.shared_experts.up_proj.{leaf}",
            transposed=True,
        ),
        _row(
            "{block}.mlp.shared_experts.down_proj.{leaf}",
            "{block}.mlp.shared_experts.down_proj.{leaf}",
            transposed=True,
        ),
        _row(
            "{root}.mtp_linear_proj.{i}.weight", "model.mtp.{i}.linear_proj.weight", transposed=True
        ),
        _row("lm_head.weight", "lm_head.weight", transposed=True),
    ),
)

# What a quantised weight has besides its integers, which keep the weight's own name.
SCALES = ("_scale", "_group_scale")


def _with_scales(rows: tuple[Row, ...]) -> Iterator[Row]:
    for row in rows:
        yield row
        if "_proj" in row.native[0] or row.native[0].startswith("lm_head"):
            for suffix in SCALES:
                native = tuple(
                    n[: -len("[{e}]")] + suffix + "[{e}]" if n.endswith("[{e}]") else n + suffix
                    for n in row.native
                )
                yield Row(tuple(s + suffix for s in row.stored), native)


# The layout `pt` where weights are integers: `name.weight` int8 or pairs of 4 bits,
# `name.weight_scale` by channel, `name.weight_group_scale` by group; see `ernie.kernels.weights`.
QUANTIZED = Layout("quantized", PT.roots, tuple(_with_scales(PT.rows)), PT.dtype_key)

LAYOUTS = {layout.name: layout for layout in (PT, TRANSFORMERS, PADDLE)}
