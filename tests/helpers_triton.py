"""Triton's interpreter made to resemble a GPU where the two differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


def make_products_placeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter multiply tiles in float64: it does so by numpy, whose results in float32
    depend on a column's place in the tile, as those of a tensor core do not."""

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        exact = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(exact + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def make_fp8_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round to nearest where it makes FP8 of float32: it cuts off."""
    cut = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return cut(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
