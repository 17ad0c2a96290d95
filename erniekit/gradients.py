"""The sums of gradients of a step, kept apart from `parameter.grad`.

A gradient is moved here the moment it is ready, added in the dtype of choice, and its float32
original is freed: with bfloat16 sums a backward pass never holds the float32 gradients of more than
one layer. Two gradients as large as the vocabulary are not even formed: the loss adds the head's
straight into its sum (`sum_of`), chunk by chunk, and the embedding adds only the rows it looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.layers import Embedding


class Gradients:
    """Sums of gradients by parameter, from the first backward pass of a step to `release()`.

    Sums are float32 or bfloat16 by `dtype`, but float32 for what is summed in many small parts
    (`float32_for`). A sum of one bfloat16 gradient is that gradient, whatever its dtype is to be.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        *,
        float32_for: tuple[nn.Parameter, ...] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self._dtypes = {id(p): dtype for p in self.parameters.values()}
        self._dtypes |= {id(p): torch.float32 for p in float32_for if id(p) in self._dtypes}
        self._sums: dict[int, Tensor] = {}
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._when_ready: Callable[[str, Tensor], None] | None = None
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._take)

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """The sum of a trained parameter's gradients, zeros when there was none yet."""
        if id(parameter) not in self._sums:
            self._sums[id(parameter)] = self._zeros(parameter)
        return self._sums[id(parameter)]

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter, dtype=self._dtypes[id(parameter)])

    def expect_last(self) -> None:
        """The next backward pass is the last of the step."""

    def complete(self) -> None:
        """After the last backward pass: sums are what they are to be when this returns."""

    def present(self) -> dict[str, Tensor]:
        """Name and sum of every parameter that got a gradient."""
        found = ((name, self._sums.get(id(p))) for name, p in self.parameters.items())
        return {name: total for name, total in found if total is not None}

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Length of all sums taken as one vector, float64 on their device; inf or nan where one
        is."""
        return length(squares_of(list(self.present().values())))

    @torch.no_grad()
    def squares(self) -> dict[str, Tensor]:
        """Squared length of each sum, float64."""
        return {name: squares_of([total])[0] for name, total in self.present().items()}

    @contextmanager
    def given_away(self, when_ready: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within, `when_ready(name, gradient)` is called for each parameter, once, and its gradient
        is freed. Those that are summed apart (`sum_of`: head, embedding) come at the end.

        Autograd has used a weight for the last time when its gradient is complete, so it may be
        changed there.
        """
        self._when_ready = when_ready
        try:
            yield
            for name, gradient in self.present().items():
                when_ready(name, gradient)
        finally:
            self._when_ready = None
            self.release()

    def release(self) -> None:
        self._sums.clear()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # else all of it went straight into the sum
            self._add(parameter, gradient)

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        key = id(parameter)
        is_first = key not in self._sums
        self._sums[key] = self._added(self._sums.get(key), gradient, self._dtypes[key])
        if self._when_ready is not None and is_first:
            self._when_ready(self._names[key], self._sums.pop(key))

    @staticmethod
    def _added(total: Tensor | None, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum with one gradient more. A first one that takes no more memory than its sum is
        kept as it is: a bfloat16 gradient becomes float32 when there is something to add to it."""
        if total is None:
            return gradient if gradient.itemsize <= dtype.itemsize else gradient.to(dtype)
        if dtype == torch.float32:
            return kernels.float32_sum(total, gradient)
        return total.to(dtype).add_(gradient)


def squares_of(gradients: list[Tensor]) -> list[Tensor]:
    """Squared length of each, float64."""
    return list(kernels.squares(gradients)) if gradients else []


def length(squares: list[Tensor]) -> Tensor:
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


class _AddRows(torch.autograd.Function):
    """Embedding look-up whose backward adds rows to a sum instead of making a (V, D) gradient."""

    @staticmethod
    def forward(ctx, weight_VD: Tensor, ids_T: Tensor, gradients: Gradients) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.weight, ctx.gradients = weight_VD, gradients
        return nn.functional.embedding(ids_T, weight_VD)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        (ids_T,) = ctx.saved_tensors
        total = ctx.gradients.sum_of(ctx.weight)
        # Sequential on a CPU; on a GPU its order of additions is fixed only where torch is told to
        # be deterministic (`erniekit.launch.repeatable`).
        total.index_add_(0, ids_T, grad_TD.to(total.dtype))
        return None, None, None


class SummedEmbedding(Embedding):
    """An `Embedding` whose gradient goes into a `Gradients` by rows."""

    def __init__(self, embedding: Embedding, gradients: Gradients) -> None:
        nn.Module.__init__(self)
        self.weight = embedding.weight
        self.gradients = gradients

    def forward(self, token_ids_T: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(token_ids_T)
        return _AddRows.apply(self.weight, token_ids_T, self.gradients)
