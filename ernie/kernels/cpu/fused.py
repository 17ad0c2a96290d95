"""The operations of serving on the CPU: `quantize`, `pack`, `project`, `mlp` and `moe`.

Weights are read in the order of weight.h; with integer weights, rows are rounded to 8 bits as in
`reference.rounded_rows` and sums stay integers for 32 columns. A row's result does not depend, to
the bit, on the rows computed with it or on the number of threads. Activations other than float32
are converted on the way in and out.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ernie.kernels.cpu.build import DTYPES, isa, library
from ernie.kernels.weights import BITS, GROUP_SIZE, PackedWeight, QuantTensor

Norm = tuple[Tensor, float]
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 3, "int4": 4, "int6": 6}  # of weight.h
CODED = 5  # bfloat16 in 12 bits: see coded.h
CODED_ISAS = ("avx2", "avx512", "avx512vnni")  # without a shuffle of bytes, decoding takes too long
ESCAPE_BYTES = 8
MOST_ESCAPES = 1 / 128  # of all weights; with more of them 16 bits are as good


class Weight(ctypes.Structure):
    """`struct Weight` of weight.h."""

    _fields_ = [("blocks", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("format", "experts", "parts", "outputs", "width")
    ]


def quantize(weight_OI: Tensor, bits: int) -> QuantTensor:
    assert bits in BITS, f"weights of {bits} bits"
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        weight_OI = weight_OI.float()
    weight_OI = weight_OI.contiguous()
    *outer, width = weight_OI.shape
    channel_O = torch.empty(outer)
    data, group_Og = torch.empty(*outer, width, dtype=torch.int8), None
    if bits == 4:
        data = torch.empty(*outer, -(-width // 2), dtype=torch.uint8)
    if bits != 8:
        group_Og = torch.empty(*outer, -(-width // GROUP_SIZE), dtype=torch.int8)
    library().ernie_quantize(
        weight_OI.data_ptr(),
        DTYPES[weight_OI.dtype],
        channel_O.numel(),
        width,
        bits,
        data.data_ptr(),
        channel_O.data_ptr(),
        _pointer(group_Og),
        torch.get_num_threads(),
    )
    return QuantTensor(bits, data, channel_O, group_Og, width)


def pack(weight: Tensor | QuantTensor, *, parts: int = 1) -> PackedWeight:
    if isinstance(weight, QuantTensor):
        name, data = f"int{weight.bits}", weight.data
        channel, scales = weight.channel_scale.float().contiguous(), weight.group_scale
    else:
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        name, data, channel, scales = str(weight.dtype).removeprefix("torch."), weight, None, None
    shape = tuple(weight.shape)
    outputs, remainder = divmod(shape[-2], parts)
    assert len(shape) in (2, 3) and not remainder, f"{parts} parts of {shape}"
    experts = shape[0] if len(shape) == 3 else 1
    data = data.contiguous()
    handle = Weight(None, FORMATS[name], experts, parts, outputs, shape[-1])
    if name == "bfloat16" and isa() in CODED_ISAS and (coded := _coded(data, handle)):
        return coded
    num_bytes = library().ernie_packed_bytes(ctypes.addressof(handle))
    blocks = torch.empty(num_bytes, dtype=torch.uint8)
    handle.blocks = blocks.data_ptr()
    scales = None if scales is None else scales.contiguous()
    library().ernie_pack(
        data.data_ptr(),
        _pointer(channel),
        _pointer(scales),
        ctypes.addressof(handle),
        torch.get_num_threads(),
    )
    return PackedWeight(shape, name, num_bytes, {"blocks": blocks}, handle)


def _coded(data_OI: Tensor, plain: Weight) -> PackedWeight | None:
    """A bfloat16 weight in 12 bits, escapes behind the blocks; None where these are too many."""
    handle = Weight(None, CODED, plain.experts, plain.parts, plain.outputs, plain.width)
    num_bytes = library().ernie_packed_bytes(ctypes.addressof(handle))
    most, found = int(MOST_ESCAPES * data_OI.numel()), ctypes.c_int64()
    # What is not used of the memory for escapes is never touched.
    blocks = torch.empty(num_bytes + most * ESCAPE_BYTES, dtype=torch.uint8)
    handle.blocks = blocks.data_ptr()
    library().ernie_pack_coded(
        data_OI.data_ptr(),
        ctypes.addressof(handle),
        most,
        ctypes.addressof(found),
        torch.get_num_threads(),
    )
    if found.value > most:
        return None
    num_bytes += found.value * ESCAPE_BYTES
    shape = tuple(data_OI.shape)
    return PackedWeight(shape, "bfloat16", num_bytes, {"blocks": blocks[:num_bytes]}, handle)


def expert(weight_EOI: PackedWeight, index: int) -> PackedWeight:
    whole, shape = weight_EOI.handle, weight_EOI.shape[1:]
    handle = Weight(None, whole.format, 1, whole.parts, whole.outputs, whole.width)
    size = library().ernie_packed_bytes(ctypes.addressof(handle))
    blocks = weight_EOI.tensors["blocks"][index * size : (index + 1) * size]
    handle.blocks = blocks.data_ptr()
    return PackedWeight(shape, weight_EOI.format, size, {"blocks": blocks}, handle)


def project(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    x = _floats(x_TI)
    num_rows, width = x.shape
    assert width == weight.shape[1], f"x is {tuple(x.shape)}, weight {weight.shape}"
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    residual = None if residual_TO is None else _floats(residual_TO)
    out = x.new_empty(num_rows, weight.shape[0])
    library().ernie_project(
        x.data_ptr(),
        x.stride(0),
        num_rows,
        ctypes.addressof(weight.handle),
        _pointer(bias_O),
        *_norm(norm, width),
        _pointer(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x_TI.dtype)


def mlp(
    x_TD: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    x = _floats(x_TD)
    num_rows, width = x.shape
    _check_mlp(gate_up, down, width)
    residual = None if residual_TD is None else _floats(residual_TD)
    out = x.new_empty(num_rows, down.shape[0])
    library().ernie_mlp(
        x.data_ptr(),
        x.stride(0),
        num_rows,
        ctypes.addressof(gate_up.handle),
        ctypes.addressof(down.handle),
        *_norm(norm, width),
        _pointer(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x_TD.dtype)


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
    x = _floats(x_TD)
    num_rows, width = x.shape
    pairs = [(gate_up, down)] + ([shared] if shared else [])
    for pair in pairs:
        _check_mlp(*pair, width)
    assert router_ED.shape == (gate_up.shape[0], width) and top_k <= len(router_ED)
    router, bias = router_ED.float().contiguous(), bias_E.float().contiguous()
    residual = None if residual_TD is None else _floats(residual_TD)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    library().ernie_moe(
        x.data_ptr(),
        x.stride(0),
        num_rows,
        router.data_ptr(),
        bias.data_ptr(),
        ctypes.addressof(gate_up.handle),
        ctypes.addressof(down.handle),
        *(ctypes.addressof(w.handle) for w in shared or ()),
        *(() if shared else (None, None)),
        top_k,
        norm_min,
        *_norm(norm, width),
        _pointer(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x_TD.dtype)


def _check_mlp(gate_up: PackedWeight, down: PackedWeight, width: int) -> None:
    assert gate_up.handle.parts == 2 and down.handle.parts == 1, (
        "gate and up are packed in two parts"
    )
    assert gate_up.shape[-1] == width == down.shape[-2] and gate_up.shape[-2] == 2 * down.shape[-1]


def _floats(x_TI: Tensor) -> Tensor:
    x_TI = x_TI.detach().float()
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def _norm(norm: Norm | None, width: int) -> tuple[int | None, int, float]:
    """Pointer to the weight, its dtype and eps."""
    if norm is None:
        return None, 0, 0.0
    weight_I, eps = norm
    assert weight_I.shape == (width,) and weight_I.is_contiguous()
    assert weight_I.dtype in (torch.float32, torch.bfloat16), f"norm of {weight_I.dtype}"
    return weight_I.data_ptr(), DTYPES[weight_I.dtype], eps


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
