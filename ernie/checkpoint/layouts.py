"""The published checkpoint layouts, as data. Reading a table is knowing the format.

A row relates what a file stores to what the model holds:

    the stored tensors, one under another  ==  the native tensors, one under another

With `transposed`, stored matrices are `[in, out]` and are turned first (vectors never are). Several
stored tensors are equal parts. `name[{e}]` is entry e of a stacked tensor: one row per expert.
Nothing but these rows is a tensor of the layout: names that fit no row are errors on either side.

    {root}   `model` or `ernie`, see `Layout.roots`     {i}   a number
    {block}  a transformer block, see `BLOCKS`          {e}   an expert
    {leaf}   `weight` or `bias`        {v}   a vision expert, counted on behind the text experts
    {tower}  `vision_model`, see `Layout.towers`

Multimodal models have tables of their own, with the rows of the text models: their experts have two
gates and two banks.

Source: the published checkpoints; ERNIE's converter to PyTorch; what transformers 5 writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


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
    towers: tuple[str, ...] = ("vision_model",)  # as `roots`, of the vision tower
    is_nested: bool = False  # whether `config.json` is transformers' kind, see `nested_config`


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

# --- multimodal models ---


def _vision_rows(transposed: bool) -> tuple[Row, ...]:
    """Vision tower and resampler: names are the same in both published layouts."""
    names = (
        ("{tower}.patch_embed.proj.weight", "vision_model.patch_embed.proj.weight"),
        *(
            (
                "{tower}.blocks.{i}." + part + ".{leaf}",
                "vision_model.blocks.{i}." + part + ".{leaf}",
            )
            for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        ),
        ("{tower}.ln.{leaf}", "vision_model.ln.{leaf}"),
        *(
            (
                "{root}.resampler_model." + part + ".{leaf}",
                "model.resampler_model." + part + ".{leaf}",
            )
            for part in ("spatial_linear.{i}", "temporal_linear.{i}", "mlp", "after_norm")
        ),
    )
    return tuple(_row(stored, native, transposed=transposed) for stored, native in names)


def _vision_twin(row: Row) -> Row:
    """The row of the vision experts, which are numbered on behind the text experts."""
    return replace(
        row,
        stored=tuple(name.replace("{e}", "{v}") for name in row.stored),
        native=tuple(name.replace(".experts.", ".vision_experts.") for name in row.native),
    )


def _gates(first: str, second: str, *, transposed: bool) -> tuple[Row, Row]:
    return (
        _row(first, "{block}.mlp.gate.weight", transposed=transposed),
        _row(second, "{block}.mlp.vision_gate.weight", transposed=transposed),
    )


def _without_gate(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.native != ("{block}.mlp.gate.weight",))


def _published_vl(text: Layout, *, transposed: bool) -> Layout:
    """The multimodal table of a published layout. Gates are `[hidden, experts]` in both."""
    experts = tuple(_vision_twin(row) for row in text.rows if "{e}" in row.stored[0])
    gates = _gates("{block}.mlp.gate.weight", "{block}.mlp.gate.weight_1", transposed=True)
    rows = (*_without_gate(text.rows), *gates, *experts, *_vision_rows(transposed))
    # The second tower is what transformers 5 writes.
    return replace(text, rows=rows, towers=("vision_model", "model.vision_model"))


PT_VL = _published_vl(PT, transposed=False)
PADDLE_VL = _published_vl(PADDLE, transposed=True)


def _transformers_vl() -> Iterator[Row]:
    """transformers 5 in memory: each bank is a block of its own, the resampler has other names."""
    bank = "{block}.mlp.%s_moe."
    yield from _without_gate(_TORCH)
    yield from _gates(
        bank % "text" + "gate.weight", bank % "vision" + "gate.weight", transposed=False
    )
    bias = bank + "gate.moe_statics.e_score_correction_bias"
    native = "{block}.mlp.moe_statics.e_score_correction_bias"
    yield _row(bias % "text" + " + " + bias % "vision", native)
    for which, ours in (("text", "experts"), ("vision", "vision_experts")):
        for name in ("gate_up_proj", "down_proj"):
            yield _row(bank % which + f"experts.{name}", "{block}.mlp." + f"{ours}.{name}")
    layers = (("fc1", "0"), ("fc2", "2"), ("ln", "3"))
    parts = [
        (f"{p}_linear.{a}", f"{p}_linear.{b}") for p in ("spatial", "temporal") for a, b in layers
    ]
    for theirs, own in (*parts, ("mlp", "mlp"), ("after_norm", "after_norm")):
        prefix = "model.resampler_model."
        yield _row(prefix + theirs + ".{leaf}", prefix + own + ".{leaf}")
    yield from (row for row in _vision_rows(False) if row.stored[0].startswith("{tower}"))


TRANSFORMERS_VL = Layout(
    name="transformers",
    roots=("model.language_model",),
    rows=tuple(_transformers_vl()),
    dtype_key="dtype",
    towers=("model.vision_tower",),
    is_nested=True,
)

QUANTIZED_VL = replace(PT_VL, name="quantized", rows=tuple(_with_scales(PT_VL.rows)))

LAYOUTS_VL = {layout.name: layout for layout in (PT_VL, TRANSFORMERS_VL, PADDLE_VL)}


def layouts_of(parameters: Iterable[str]) -> dict[str, Layout]:
    """The tables of a model with these parameters, by name."""
    return LAYOUTS_VL if any(name.startswith("vision_model.") for name in parameters) else LAYOUTS
