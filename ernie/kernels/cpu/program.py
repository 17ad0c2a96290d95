"""What a function does on the CPU, recorded once and done again without Python.

A decode step is the same hundred calls of the compiled library every time, each as short as what
Python needs to make it. `record` runs a function and notes

    calls of the library   the addresses and numbers they were given
    operations of torch    the operation with its arguments; what it returns is copied to where it
                           was the first time
    views                  nothing: they have an address and that is all

and keeps every tensor alive that it saw. `Program.run` makes neighbouring calls in one call of the
library, whose threads stay awake from one to the next. It is for functions that do the same thing
every time: they read what changes from tensors that stay where they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ernie.kernels.cpu.build import SIGNATURES, loaded_library, recorders

T = TypeVar("T")


class NotRecordable(RuntimeError):
    """The function decides something by the values in its tensors."""


class Program:
    """Steps in their order. Raises nothing: they have run before with the same shapes."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []
        self.kept: list[object] = []  # tensors and memory that the steps point at

    def run(self) -> None:
        for step in self.steps:
            step()


def record(function: Callable[[], T]) -> tuple[T, Program]:
    """The result of `function()`, and the program that computes it anew in the same memory.

    Raises NotRecordable.
    """
    assert recorders.current is None, "one recording at a time"
    program = Program()
    recorders.current = recorder = _Recorder(program)
    try:
        with _Operations(recorder), _Refusals():
            result = function()
    finally:
        recorders.current = None
    recorder.flush()
    return result, program


class _Recorder:
    """Stands in for the library: its functions run, and are noted."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.library = loaded_library()
        self.calls: list[tuple[int, Any]] = []  # of one run: function and its words

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not hasattr(self.library, f"{name}_again"):
            raise NotRecordable(f"{name} is not made to be recorded")
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(self.library, name)(*arguments)
        words = b"".join(map(self._word, SIGNATURES[name.removeprefix("ernie_")], arguments))
        again = ctypes.cast(getattr(self.library, f"{name}_again"), ctypes.c_void_p)
        self.calls.append((again.value or 0, self._memory(words)))

    def _word(self, code: str, value: Any) -> bytes:
        """An argument as `of_word` of program.h reads it."""
        if code == "f":
            return struct.pack("=f4x", value)
        if isinstance(value, bytes):
            value = ctypes.addressof(self._memory(value))
        return struct.pack("=q", value or 0)

    def _memory(self, content: bytes) -> Any:
        memory = ctypes.create_string_buffer(content, len(content))
        self.program.kept.append(memory)
        return memory

    def flush(self) -> None:
        """The calls noted since the last time become one step."""
        if not self.calls:
            return
        pairs = [word for again, words in self.calls for word in (again, ctypes.addressof(words))]
        entries = self._memory(struct.pack(f"={len(pairs)}q", *pairs))
        replay, count = self.library.ernie_replay, len(self.calls)
        arguments = ctypes.addressof(entries), count, torch.get_num_threads()
        self.program.steps.append(partial(replay, *arguments))
        self.calls = []


class _Refusals(TorchFunctionMode):
    """Notices what reads a tensor's values past the operations of torch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in _READERS:
            raise NotRecordable(f"Tensor.{function.__name__} gives values to Python")
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Notes the operations of torch between the calls of the library."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Or torch imports its compiler, which nothing uses: seconds of the first request."""
        return False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        kept, steps = self.recorder.program.kept, self.recorder.program.steps
        kept.append((args, kwargs, result))
        returned = operation._schema.returns
        tensors = torch.TensorType, torch.ListType
        if not all(isinstance(value.type, tensors) for value in returned):
            raise NotRecordable(f"{operation} gives a number to Python")
        is_view = returned[0].alias_info is not None and _share_memory(result, args)
        if operation._schema.is_mutable:
            self.recorder.flush()
            steps.append(partial(operation, *args, **kwargs))
        elif not is_view and operation.overloadpacket not in _ALLOCATIONS:
            assert isinstance(result, Tensor), f"{operation} gives several tensors"
            self.recorder.flush()
            steps.append(lambda: result.copy_(operation(*args, **kwargs)))
        return result


def _share_memory(result: Any, arguments: tuple[Any, ...]) -> bool:
    """`aten.to` and others say that they may give a view, and do or do not."""
    first = result if isinstance(result, Tensor) else result[0]
    places = [x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)]
    return first.untyped_storage().data_ptr() in places


_READERS = (Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__array__)
_ALLOCATIONS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
