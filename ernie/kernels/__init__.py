"""The operations that decide the speed of the family: their names, shapes, dtypes and meaning.

Every function here is a thin call of the implementation picked for the tensors' device
(`ernie.kernels.dispatch`). `ernie.kernels.reference` holds the same functions in plain torch and is
their definition: tests compare every other implementation with it, and it is what runs where
nothing better exists. `report()` tells which implementation each operation uses, and why.

Legend of the shape letters:
    T  tokens of the flat batch          D  hidden size
    H  query heads    G  key/value heads (H % G == 0)    d  head width
    I, O  input and output width of a product            E  experts
    N  rows of a grouped product         V  vocabulary    S  segments (sequences) of a packed row
    B  blocks of the paged cache         P  positions of one block
    r  elements of a row of the cache: one head of one token       R  rows of logits

Training calls the operations on plain tensors. Serving packs each weight once (`pack`, after
`quantize` if it is to be small) and calls the fused operations `project`, `mlp` and `moe`, which
take a norm before the product and a residual after it, so that nothing stands between two reads of
weights. Products with integer weights round activations to 8 bits where that is the fast way (CPU;
see `reference.rounded_rows`), and do not elsewhere.

All operations take float32 or bfloat16 activations. Sums (products, norms, softmax) are accumulated
in float32 whatever the inputs are. Results have the dtype of the activations. "Differentiable"
operations have a backward pass for every floating point tensor they take.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ernie.kernels.dispatch import (
    batch_invariant,
    bfloat16_products,
    has_bfloat16_products,
    is_batch_invariant,
    is_compiled,
    pick,
    report,
)
from ernie.kernels.reference import AdamWUpdate, cache_width
from ernie.kernels.weights import FP8Tensor, PackedWeight, QuantTensor

Norm = tuple[Tensor, float]  # weight and eps of an RMS norm

__all__ = [
    "AdamWUpdate",
    "FP8Tensor",
    "Norm",
    "PackedWeight",
    "QuantTensor",
    "adamw_8bit_step",
    "adamw_step",
    "add_product_",
    "argmax",
    "attend_packed",
    "attend_paged",
    "batch_invariant",
    "bfloat16_products",
    "cache_width",
    "combine",
    "combine_backward",
    "cross_entropy_",
    "draw",
    "expert",
    "float32_sum",
    "fp8_grouped_linear",
    "fp8_linear",
    "grouped_linear",
    "has_bfloat16_products",
    "is_batch_invariant",
    "is_compiled",
    "linear",
    "mlp",
    "moe",
    "pack",
    "project",
    "quantize",
    "quantize_fp8",
    "quantize_nf4",
    "quick_gelu",
    "report",
    "rms_norm",
    "rotate",
    "rotate_",
    "rows_gradient",
    "sort_pairs",
    "spread",
    "squares",
    "swiglu",
    "swiglu_halves",
    "token_logprobs",
    "write_cache",
]


def linear(x_TI: Tensor, weight_OI: Tensor | QuantTensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, `(T, O)` in x's dtype; weights may be bfloat16 under float32
    activations.

    A quantised weight counts as the values that it stands for, with unrounded rows: for frozen
    weights in training. Differentiable in x, and in weight and bias where they require it.
    """
    return pick("linear", x_TI.device)(x_TI, weight_OI, bias_O)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor | QuantTensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert: the first `counts[0]` rows times expert 0's weight, and so on; `(N,
    O)`.

    `counts_E` is int64 and sums to N. Quantised weights as in `linear`. Differentiable in x and
    weight.
    """
    return pick("grouped_linear", x_NI.device)(x_NI, weight_EOI, counts_E)


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, quant_input_grad: bool
) -> Tensor:
    """`linear` of rows and weight rounded by `quantize_fp8`, so with a scale for each token and one
    for each output.

    The gradient of the rows is `grad @ weight`, with `quant_input_grad` of both rounded too (a
    scale for each token and one for each input); that of the weight is of unrounded factors. Sums
    are float32. On a GPU from Ada on the products are its FP8 ones, elsewhere float32 ones of the
    rounded values: those are for trying what the rounding does, and slower. Source: the forward
    and rows' products of ERNIE's FP8 recipe, with scales of whole rows in place of 128 columns.
    """
    product = pick("fp8_linear", x_TI.device)
    return product(x_TI, weight_OI, bias_O, quant_input_grad=quant_input_grad)


def fp8_grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, *, quant_input_grad: bool
) -> Tensor:
    """`grouped_linear`, with factors rounded as in `fp8_linear`."""
    product = pick("fp8_grouped_linear", x_NI.device)
    return product(x_NI, weight_EOI, counts_E, quant_input_grad=quant_input_grad)


def quantize_fp8(x_RC: Tensor) -> FP8Tensor:
    """Rows of x, `(..., R, C)` and maybe a transposed view, in 8-bit floats (e4m3): the scale of a
    row is its largest magnitude / 448. Rounded to nearest, ties to even. Not differentiable.
    """
    return pick("quantize_fp8", x_RC.device)(x_RC)


def rows_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """`grad @ weight`, `(T, I)` in the dtype of grad: what the backward pass of `linear` gives its
    rows. Not differentiable.
    """
    return pick("rows_gradient", grad_TO.device)(grad_TO, weight_OI)


def add_product_(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    """`total += left.T @ right`, in place, summed in float32; the factors have one dtype. What a
    product's backward pass adds to the gradient of its weight. Not differentiable.
    """
    pick("add_product_", total_OI.device)(total_OI, left_NO, right_NI)


def sort_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The (token, choice) pairs of T tokens with K choices each, stably sorted by expert.

    Returns `order_N`: place n holds pair `order[n] = t * K + k`; its inverse, `place_TK`; and how
    many pairs each expert got, int64 `(E,)`. The first two are integers of the device's liking, for
    `spread` and `combine`. Not differentiable, like these: `ernie.moe.dispatch` puts them together.
    """
    return pick("sort_pairs", experts_TK.device)(experts_TK, num_experts)


def spread(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """A row for each sorted pair, that of its token; `(N, D)`."""
    return pick("spread", x_TD.device)(x_TD, order_N, top_k)


def combine(rows_ND: Tensor, place_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """`sum over k of weights[t, k] * rows[place[t, k]]`, in float32 and in this order; `(T, D)` in
    the dtype of the rows. Weights are float32, or all one."""
    return pick("combine", rows_ND.device)(rows_ND, place_TK, weights_TK)


def combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` for its rows `(N, D)`, in their dtype, and its weights `(T, K)`."""
    return pick("combine_backward", rows_ND.device)(grad_TD, rows_ND, weights_TK, order_N)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x**2) + eps))`: statistics in float32, rounded to x's dtype before
    the product with weight (Source: transformers and PaddleFormers, which agree).

    Differentiable.
    """
    return pick("rms_norm", x_TD.device)(x_TD, weight_D, eps)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, *, halves: bool = False) -> Tensor:
    """Interleaved rotary embedding: pair `(x[2i], x[2i+1])` turned by the angle of `cos[:, i],
    sin[:, i]`; with `halves` the pairs are `(x[i], x[i + d/2])`.

    `cos` and `sin` are float32 `(T, d/2)`; the rotation is done in float32. Differentiable in x.
    """
    return pick("rotate", x_THd.device)(x_THd, cos_Tp, sin_Tp, halves=halves)


def rotate_(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> None:
    """`rotate`, in place and not differentiable; x may be a column slice of a wider tensor.

    Query and key heads that lie side by side in one projection are turned as the heads of one x.
    """
    pick("rotate_", x_THd.device)(x_THd, cos_Tp, sin_Tp)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """`silu(gate) * up`, `(T, I)`. Differentiable. Inputs may be column slices of one wider
    tensor."""
    return pick("swiglu", gate_TI.device)(gate_TI, up_TI)


def swiglu_halves(gate_up_Tw: Tensor) -> Tensor:
    """`swiglu` of the two halves of each row, gate first; `(T, w / 2)`. Differentiable."""
    return pick("swiglu_halves", gate_up_Tw.device)(gate_up_Tw)


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`. Differentiable, and then nothing but x is kept."""
    return pick("quick_gelu", x.device)(x)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The squared length of each tensor, float64 `(n,)`; all on one device. Not differentiable."""
    return pick("squares", tensors[0].device)(tensors)


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`-log softmax(logits[n])[targets[n]]`, float32 `(N,)`, and whether no logit is larger than
    the target's, bool `(N,)`.

    In place: logits become the gradient of `scale` times the sum of the losses, in their own dtype;
    all arithmetic is float32. Targets are int64. Contiguous logits; not differentiable.
    """
    return pick("cross_entropy_", logits_NV.device)(logits_NV, targets_N, scale)


def argmax(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row, int64 `(R,)`: the first of several, and a NaN before all
    numbers."""
    return pick("argmax", logits_RV.device)(logits_RV)


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
) -> Tensor:
    """One token a row, int64 `(R,)` on the logits' device: the inverse of the cumulative
    distribution, in the order of ids, at `uniform`.

    Of the softmax of `logits / temperature`, `min_p` keeps tokens with at least that share of the
    likeliest one's probability; then `top_k` (0 = all) keeps the k likeliest, the smaller id among
    equals; then `top_p` keeps the fewest likeliest ones that together reach that share of what is
    left, and at least one. Settings are float64 (`top_k` int64) and in the host's memory, so that
    what is to be done is known without asking a GPU. Probabilities are float32 in units of 2**-44
    of the likeliest: their sums are exact, whatever the order, and a row's token does not depend on
    the rows beside it. A row without a number gives 0. Not more than 2**18 columns.
    """
    return pick("draw", logits_RV.device)(
        logits_RV, temperature_R, min_p_R, top_k_R, top_p_R, uniform_R
    )


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    """`log softmax(logits[r])[tokens[r]]`, float32 `(R,)`. Tokens are int64. Not differentiable."""
    return pick("token_logprobs", logits_RV.device)(logits_RV, tokens_R)


def attend_packed(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_S1: Tensor,
    scale: float,
    lengths: Sequence[int] | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Attention inside each segment of a packed row; `(T, H, d)`. Token i of a segment sees its
    tokens up to i, or, not `causal`, all of them.

    `cu_seqlens` is int32 `(S + 1,)`, begins with 0 and ends with T: segment s is rows
    `cu_seqlens[s]:cu_seqlens[s+1]`. `lengths` are those of the segments, where the host knows
    them: it spares a GPU some work. Query head h reads key/value head `h // (H // G)`. Softmax in
    float32. Differentiable in q, k, v.
    """
    return pick("attend_packed", q_THd.device)(
        q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, lengths, causal=causal
    )


def attend_paged(
    q_THd: Tensor,
    k_cache_BPGr: Tensor,
    v_cache_BPGr: Tensor,
    tables_SM: Tensor,
    cu_seqlens_S1: Tensor,
    lens_S: Tensor,
    scale: float,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of S sequences over their paged cache; `(T, H, d)`.

    Sequence s owns query rows `cu_seqlens[s]:cu_seqlens[s+1]`, which are the *last* ones of its
    `lens[s]` tokens. Their keys and values are in the cache already, or they are `new`: the `k, v,
    slots` of `write_cache`, stored before anything is read. Token j of sequence s lies in block
    `tables[s, j // P]` at offset `j % P`. `tables`, `cu_seqlens`, `lens` are int32; entries of
    `tables` past the last used block are never read. A sequence may have no query rows. Not
    differentiable.
    """
    return pick("attend_paged", q_THd.device)(
        q_THd, k_cache_BPGr, v_cache_BPGr, tables_SM, cu_seqlens_S1, lens_S, scale, new
    )


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGr: Tensor, v_cache_BPGr: Tensor, slots_T: Tensor
) -> None:
    """Store each token's key and value at its slot (`block * P + offset`, int64); negative slots
    are skipped.

    A cache is of float32, bfloat16 or float16, and then r is d; or of int8, where a row is d
    integers and behind them, in r = d + 4 bytes, the float32 scale that makes values of them: the
    largest magnitude / 127. Values are rounded to nearest, ties to even. In place, not
    differentiable.
    """
    pick("write_cache", k_TGd.device)(k_TGd, v_TGd, k_cache_BPGr, v_cache_BPGr, slots_T)


def quantize(weight_OI: Tensor, bits: int) -> QuantTensor:
    """A weight `(O, I)` or `(E, O, I)` in 8, 6 or 4 bits; see `ernie.kernels.weights` for the
    formats.

    8 bits: the scale of a channel is its largest magnitude / 127. 6 and 4 bits: that of a group is
    the one with the least squared error among a few candidates.
    """
    return pick("quantize", weight_OI.device)(weight_OI, bits)


def quantize_nf4(weight_OI: Tensor, *, double: bool = False) -> QuantTensor:
    """A weight `(O, I)` or `(E, O, I)` in the 16 levels of nf4, 64 columns with one scale, their
    largest magnitude.

    `double` keeps these scales in 8 bits with one float32 for each channel (the paper: 256 scales
    with one, in floats of 8 bits). Source: Dettmers et al., QLoRA, arXiv:2305.14314.
    """
    return pick("quantize_nf4", weight_OI.device)(weight_OI, double=double)


def pack(weight: Tensor | QuantTensor, *, parts: int = 1) -> PackedWeight:
    """The form in which this device's fused operations read a weight `(O, I)` or `(E, O, I)`.

    `parts` is how many weights were stacked along O, where an operation takes them apart again (2
    for the gate and up projections of `mlp` and `moe`, gate first). Gives the bits of the device's
    own products: the result may share memory with `weight`.
    """
    data = weight.data if isinstance(weight, QuantTensor) else weight
    return pick("pack", data.device)(weight, parts=parts)


def expert(weight_EOI: PackedWeight, index: int) -> PackedWeight:
    """The weight `(O, I)` of one expert, as `project` takes it; shares the memory."""
    return pick("expert", next(iter(weight_EOI.tensors.values())).device)(weight_EOI, index)


def project(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`residual + rms_norm(x) @ weight.T + bias`, each part if given; `(T, O)` in x's dtype.

    A new tensor; not differentiable. A row's result does not depend on the rows beside it where
    the weight is of integers.
    """
    return pick("project", x_TI.device)(x_TI, weight, bias_O, norm=norm, residual_TO=residual_TO)


def mlp(
    x_TD: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """`residual + swiglu(gate(y), up(y)) @ down.T` with `y = rms_norm(x)`, the last two parts if
    given; `(T, D)`.

    `gate_up` was packed in two parts. Not differentiable.
    """
    return pick("mlp", x_TD.device)(x_TD, gate_up, down, norm=norm, residual_TD=residual_TD)


def moe(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: tuple[PackedWeight, PackedWeight] | None,
    *,
    top_k: int,
    norm_min: float,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """A whole mixture-of-experts layer over packed weights; `(T, D)`. Not differentiable.

    With `y = rms_norm(x)`: `residual + sum over the chosen experts of weight * expert(y) +
    shared(y)`. Routing as in `ernie.moe.router`: in float32, `p = softmax(router @ y)`, the `top_k`
    of `p + bias` are chosen (the smaller index among equals), weights are their p over the sum of
    these (at least `norm_min`). `gate_up` is `(E, 2M, D)` packed in two parts, `down` `(E, D, M)`.
    """
    return pick("moe", x_TD.device)(
        x_TD,
        router_ED,
        bias_E,
        gate_up,
        down,
        shared,
        top_k=top_k,
        norm_min=norm_min,
        norm=norm,
        residual_TD=residual_TD,
    )


def float32_sum(total: Tensor, gradient: Tensor) -> Tensor:
    """`total + gradient` in float32, of tensors of one shape: in `total` itself if that is float32,
    else in memory of its own."""
    return pick("float32_sum", total.device)(total, gradient)


def adamw_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    """One AdamW step with decoupled weight decay, in place, over one tensor of any shape taken as
    flat.

    The parameter is float32; the gradient float32 or bfloat16; the running mean `moment` and mean
    square `square` both float32 or both bfloat16. Bfloat16 moments are rounded up or down at
    random, with probabilities that make the mean exact, so that updates far below their last bit
    still count; the random bits are a hash of (seed, step, element), so a resumed run repeats them.
    Every implementation gives the same bits.
    `short`, if given, gets the new parameter in its own dtype (bfloat16, to nearest). Contiguous
    tensors. Not differentiable.

    Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    """
    pick("adamw_step", parameter_N.device)(
        parameter_N, gradient_N, moment_N, square_N, update, short_N
    )


def adamw_8bit_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    scales_2B: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    """`adamw_step` whose moments take one byte a weight and 8 bytes for each 256 weights.

    `moment` is int8 and `square` uint8, both of the parameter's size; `scales` float32 `(2, B)`, B
    blocks of 256 in flat order: a moment is code * scale, the root of a square is code * scale. The
    update itself uses the new moments before they are rounded. What is kept is off by less than
    1/127 of the block's largest moment and 1/255 of its largest root, is rounded at random as in
    `adamw_step`, and has the right mean, but that a root above zero is kept at least 1/255. Every
    implementation gives the same bits.

    Source: Dettmers et al., arXiv:2110.02861 (block-wise moments); linear codes of the root here.
    """
    pick("adamw_8bit_step", parameter_N.device)(
        parameter_N, gradient_N, moment_N, square_N, scales_2B, update, short_N
    )
