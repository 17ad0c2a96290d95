"""What is computed again gives the same gradients, and leaves nothing behind."""

from __future__ import annotations

import weakref

import pytest
import torch

from ernie.recomputed import Function, keep, recomputed, saved_by


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    sizes = [(6, 9), (9, 9), (9, 4)]
    return torch.nn.Sequential(*[m for s in sizes for m in (torch.nn.Linear(*s), torch.nn.Tanh())])


def gradients(forward, model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    own = x.clone().requires_grad_()
    forward(own).square().sum().backward()
    return [own.grad, *(p.grad.clone() for p in model.parameters())]


def test_gradients_are_equal_to_the_bit_also_nested():
    model, x = layers(), torch.randn(5, 6)
    first, rest = model[:2], model[2:]

    def nested(x: torch.Tensor) -> torch.Tensor:
        return rest(recomputed(first, x) * 2)

    plain = gradients(lambda x: rest(first(x) * 2), model, x)
    for forward in (lambda x: recomputed(nested, x), nested):
        for own, other in zip(gradients(forward, model, x), plain, strict=True):
            assert torch.equal(own, other)


def test_it_stops_as_soon_as_there_is_enough():
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        calls.append("kept")
        z = y + 1  # keeps nothing
        calls.append("not needed")
        return z

    x = torch.ones(3, requires_grad=True)
    recomputed(forward, x).sum().backward()
    assert calls == ["kept", "not needed"]  # of the first run; the second ends within sin
    assert torch.equal(x.grad, torch.ones(3).cos())


class Square(Function):
    runs = 0

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        keep(ctx, x, None)
        Square.runs += 1
        return x * x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_a_function_that_says_what_it_keeps_is_stopped_before_it_computes():
    def gradient(forward) -> tuple[torch.Tensor, int]:
        Square.runs = 0
        x = torch.arange(3.0, requires_grad=True)
        forward(x).sum().backward()
        return x.grad, Square.runs

    def twice(x: torch.Tensor) -> torch.Tensor:
        return Square.apply(Square.apply(x)) + 1

    def passed_by(x: torch.Tensor) -> torch.Tensor:
        with saved_by(lambda saved: saved, lambda saved: saved):  # of someone else
            return Square.apply(x)

    expected, _ = gradient(twice)
    for forward, num_runs in (
        (lambda x: recomputed(twice, x), 2 + 1),  # the second of the second run is not needed
        (lambda x: recomputed(lambda x: recomputed(twice, x), x), 2 + 1),  # the outer has nothing
        (lambda x: recomputed(lambda x: Square.apply(passed_by(x)), x), 2 + 1),
    ):
        found, runs = gradient(forward)
        assert torch.equal(found, expected) and runs == num_runs


def test_what_is_computed_without_gradients_does_not_count():
    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            still = Square.apply(x)  # would be the last tensor wanted, if it were saved
        return Square.apply(5 * x + still)

    x, own = (torch.arange(1.0, 4.0, requires_grad=True) for _ in range(2))
    forward(x).sum().backward()
    recomputed(forward, own).sum().backward()
    assert torch.equal(x.grad, own.grad)


def test_nothing_outlives_the_backward_pass_or_a_graph_that_is_dropped():
    alive: list[weakref.ref] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()  # keeps its own result
        alive.append(weakref.ref(y))
        return y.tanh() * 2

    x = torch.ones(3, requires_grad=True)
    recomputed(forward, x).sum().backward()
    out = recomputed(forward, x)
    del out
    assert len(alive) == 3 and all(ref() is None for ref in alive)


def test_frozen_arguments_and_a_second_pass_over_the_graph():
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    out = recomputed(lambda x, w: (x @ w).tanh().sum(), x, weight)
    first = torch.autograd.grad(out, weight, retain_graph=True)[0]
    again = torch.autograd.grad(out, weight)[0]
    plain = torch.autograd.grad((x @ weight).tanh().sum(), weight)[0]
    assert torch.equal(first, plain) and torch.equal(again, plain)


def test_a_function_that_does_something_else_the_second_time_is_refused():
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin().sin() if len(calls) == 1 else x.sin()

    out = recomputed(forward, torch.ones(2, requires_grad=True))
    with pytest.raises(AssertionError, match="kept 2 tensors, then 1"):
        out.sum().backward()
