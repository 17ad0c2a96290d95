"""LoRA and its kin: small trained matrices beside frozen weights, put in by a walk over the model.

    y = x W' + scale * (x A') B'             A (r, in), B (out, r), both float32
    y = m / |W + scale B A| * (the same)     DoRA: m (out,) is trained, the norms of rows are not

LoRA begins with B = 0 and a random A, DoRA with m = |W| besides. PiSSA begins with the largest r
singular values in B A and takes them out of W, which is frozen as what is left. Weights may be kept
in few bits (`Freeze`); the arithmetic beside them is the same.

Attention, dense blocks, shared experts and routed experts may have pairs, these stacked like the
experts (`erniekit.lora_targets` says which). Embedding, head, router and norms stay as they are.
Files are those of `erniekit.lora_files`.

Source: Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732 (rank-stabilised scale); Hayou
et al., arXiv:2402.12354 (LoRA+, in the optimizer); Liu et al., arXiv:2402.09353 (DoRA; norms as in
section 4.3); Meng et al., arXiv:2404.02948 (PiSSA).

Legend: T tokens, N rows sorted by expert, E experts, I/O in/out width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.kernels.weights import QuantTensor
from ernie.layers import Linear
from ernie.model import Block, ErnieModel
from ernie.moe.experts import Experts
from ernie.settings import ConfigError
from erniekit.lora_targets import chosen

Weight = Tensor | QuantTensor
STACKED = ("gate_up_proj", "down_proj")
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector")  # last parts of names of parameters


@dataclass(frozen=True)
class LoRA:
    """What adapters are like. `targets` are no part of the comparison: names of tensors tell."""

    rank: int
    alpha: float
    is_rank_stabilised: bool = False
    has_magnitude: bool = False  # DoRA
    is_principal: bool = False  # PiSSA
    targets: tuple[str, ...] = field(default=(), compare=False)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)

    def doubled(self) -> LoRA:
        """Twice the rank with the same scale: the form of a PiSSA adapter beside its whole base."""
        alpha = self.alpha * (math.sqrt(2) if self.is_rank_stabilised else 2)
        return replace(self, rank=2 * self.rank, alpha=alpha, is_principal=False)


# --- the trained parts ---


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Pair(nn.Module):
    """The trained parts beside a weight `(O, I)`, or beside a stack `(E, O, I)`."""

    row_squares: Tensor

    def __init__(self, weight: Weight, lora: LoRA) -> None:
        super().__init__()
        *experts, out_size, in_size = weight.shape
        device = weight.device
        self.scale = lora.scale
        self.lora_A = nn.Parameter(torch.zeros(*experts, lora.rank, in_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_size, lora.rank, device=device))
        self.lora_magnitude_vector: nn.Parameter | None = None
        self.dropout: Callable[[Tensor], Tensor] = _as_it_is  # of what A reads
        if lora.has_magnitude:
            self.register_buffer("row_squares", row_squares(weight), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(self.row_squares.sqrt())

    @torch.no_grad()
    def row_norms(self, weight: Weight) -> Tensor:
        """`|W + scale B A|` of each row, `(O,)` or `(E, O)`, without making the sum.

        `|w|^2 + 2 scale <w A', b> + scale^2 b (A A') b'`, where the first is known.
        """
        a, b = self.lora_A, self.lora_B
        if a.dim() == 2:
            projected = kernels.linear(a, weight)  # (r, O)
        else:
            counts_E = torch.full((len(a),), a.shape[1], device=a.device)
            projected = kernels.grouped_linear(a.flatten(0, 1), weight, counts_E)
            projected = projected.view(*a.shape[:2], -1)
        cross = (b * projected.mT).sum(-1)
        own = ((b @ (a @ a.mT)) * b).sum(-1)
        squares = self.row_squares + 2 * self.scale * cross + self.scale**2 * own
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def row_factors(self, weight: Weight) -> Tensor:
        """What DoRA multiplies the outputs with, `(O,)` or `(E, O)`."""
        assert self.lora_magnitude_vector is not None
        return self.lora_magnitude_vector / self.row_norms(weight)

    @torch.no_grad()
    def merge_into(self, out: Tensor, weight: Weight) -> None:
        """Have `out`, which may be `weight`, compute the same without the pair; float32, rounded
        once to its dtype.
        """
        trained = [self.lora_A, self.lora_B]
        if self.lora_magnitude_vector is not None:
            trained.append(self.lora_magnitude_vector)
        stacks = [out, *trained] if out.dim() == 3 else [t[None] for t in (out, *trained)]
        for matrix, merged, a, b, *magnitude in zip(_matrices(weight), *stacks):
            values = _values(matrix) + self.scale * (b @ a)
            if magnitude:
                norms = values.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
                values *= (magnitude[0] / norms)[:, None]
            merged.copy_(values)


class LoRALinear(Pair):
    """A frozen `Linear` with a trained pair beside it."""

    def __init__(self, base: Linear, lora: LoRA) -> None:
        super().__init__(base.weight, lora)
        self.base = base

    def forward(self, x_TI: Tensor) -> Tensor:
        low_Tr = kernels.linear(self.dropout(x_TI), self.lora_A) * self.scale
        if self.lora_magnitude_vector is None:
            more_TO = kernels.linear(low_Tr, self.lora_B)
            return self.base(x_TI) + more_TO  # the base last, which keeps no rows
        out_TO = kernels.linear(x_TI, self.base.weight) + kernels.linear(low_Tr, self.lora_B)
        out_TO = out_TO * self.row_factors(self.base.weight).to(out_TO.dtype)
        return out_TO if self.base.bias is None else out_TO + self.base.bias.to(out_TO.dtype)


class LoRAExpertsProjection(Pair):
    """The pairs of one stacked projection: A `(E, r, I)`, B `(E, O, r)`, m `(E, O)`."""

    def forward(self, x_NI: Tensor, weight_EOI: Weight, counts_E: Tensor) -> Tensor:
        """The projection with its pairs; `(N, O)`."""
        out_NO = kernels.grouped_linear(x_NI, weight_EOI, counts_E)
        low_Nr = kernels.grouped_linear(self.dropout(x_NI), self.lora_A, counts_E) * self.scale
        out_NO = out_NO + kernels.grouped_linear(low_Nr, self.lora_B, counts_E)
        if self.lora_magnitude_vector is None:
            return out_NO
        factors_EO = self.row_factors(weight_EOI).to(out_NO.dtype)
        groups = zip(out_NO.split(counts_E.tolist()), factors_EO)
        return torch.cat([rows * factors_O for rows, factors_O in groups])


class LoRAExperts(nn.Module):
    """Frozen `Experts` with trained pairs beside both projections of each expert, or one."""

    def __init__(self, base: Experts, lora: LoRA, names: Collection[str]) -> None:
        super().__init__()
        self.base = base
        for name in STACKED:
            pair = LoRAExpertsProjection(getattr(base, name), lora) if name in names else None
            setattr(self, name, pair)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        inner_NM = kernels.swiglu_halves(self.project("gate_up_proj", x_ND, counts_E))
        return self.project("down_proj", inner_NM, counts_E)

    def project(self, name: str, x_NI: Tensor, counts_E: Tensor) -> Tensor:
        """One of the two projections of rows sorted by expert."""
        pair, weight_EOI = getattr(self, name), getattr(self.base, name)
        if pair is None:
            return kernels.grouped_linear(x_NI, weight_EOI, counts_E)
        return pair(x_NI, weight_EOI, counts_E)


def _matrices(weight: Weight) -> list[Weight]:
    return [weight] if len(weight.shape) == 2 else [weight[e] for e in range(weight.shape[0])]


def _values(matrix: Weight) -> Tensor:
    """What a matrix stands for, float32."""
    return matrix.float() if isinstance(matrix, Tensor) else matrix.dequantized()


def row_squares(weight: Weight) -> Tensor:
    """Sum of squares of each row, float32 `(O,)` or `(E, O)`; one matrix at a time is widened."""
    squares = [_values(matrix).square().sum(-1) for matrix in _matrices(weight)]
    return torch.stack(squares).view(weight.shape[:-1])


def principal(weight: Tensor, lora: LoRA) -> tuple[Tensor, Tensor]:
    """A `(..., r, I)` and B `(..., O, r)`, float32, with `scale * B A` the best approximation of
    rank r: `W = U S V'`, `B = U (S / scale)^(1/2)`, `A = (S / scale)^(1/2) V'` of the largest r.

    The singular vectors are the eigenvectors of `W W'` or `W' W`, whichever is smaller, in float64:
    the same vectors at a fraction of the time of a whole decomposition.
    """
    if weight.dim() == 3:
        parts = [principal(matrix, lora) for matrix in weight]
        a, b = zip(*parts)
        return torch.stack(a), torch.stack(b)
    wide = weight.double()
    is_tall = wide.shape[0] > wide.shape[1]
    if is_tall:
        wide = wide.T
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -lora.rank :].flip(-1)
    right = left.T @ wide  # S V'
    roots = right.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    b = left * (roots / lora.scale).sqrt()
    a = right / (roots * lora.scale).sqrt()[:, None]
    if is_tall:
        a, b = b.T, a.T
    return a.float().contiguous(), b.float().contiguous()


# --- the walk ---

# Makes of a weight and its format name (`dense` or `experts`) what is kept of it.
Freeze = Callable[[Tensor, str], Weight]


class Preparation:
    """Puts adapters into blocks, one after the other: `add_lora` for a model that is being read.

    Each block must come once, in order: A is drawn from one generator. Prediction blocks stay as
    they are. `freeze` makes the few bits
    of every projection, those without a pair too, after PiSSA has taken out its part.
    """

    def __init__(
        self, lora: LoRA, names: Collection[str], *, seed: int, freeze: Freeze | None = None
    ) -> None:
        self.lora, self.freeze = lora, freeze
        self.homes = {name[: name.index(".", len("model.layers.")) + 1] for name in names}
        self.names = chosen(names, lora.targets)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, block: nn.Module) -> nn.Module:
        assert isinstance(block, Block)
        block.requires_grad_(False)
        home = f"model.layers.{block.self_attn.layer}."
        if home not in self.homes:
            return block
        for path, parent, name, child in list(_projections(block, home)):
            if isinstance(child, Experts):
                wanted = [leaf for leaf in STACKED if f"{path}.{leaf}" in self.names]
                starts = {
                    leaf: self._begin(child, leaf, "experts", leaf in wanted) for leaf in STACKED
                }
                if wanted:
                    wrapped = LoRAExperts(child, self.lora, wanted)
                    for leaf in wanted:
                        self._fill(getattr(wrapped, leaf), starts[leaf])
                    setattr(parent, name, wrapped)
            else:
                start = self._begin(child, "weight", "dense", path in self.names)
                if path in self.names:
                    linear = LoRALinear(child, self.lora)
                    self._fill(linear, start)
                    setattr(parent, name, linear)
        return block

    def _begin(
        self, home: nn.Module, leaf: str, kind: str, has_pair: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Bring a weight into its frozen form; PiSSA's A and B."""
        weight = getattr(home, leaf)
        start = None
        if has_pair and self.lora.is_principal:
            if self.lora.rank > (most := min(weight.shape[-2:])):
                raise ConfigError(
                    f"pissa: lora_rank={self.lora.rank} is more than the {most} singular values of "
                    f"a weight of {tuple(weight.shape[-2:])}; give {most} or less"
                )
            start = principal(weight, self.lora)
            # In float32, rounded once: to the weight's dtype, or to few bits.
            rest = weight.float() - self.lora.scale * (start[1] @ start[0])
            weight = rest if self.freeze else rest.to(weight.dtype)
        if self.freeze:
            kept = self.freeze(weight.detach(), kind)
            delattr(home, leaf)  # a parameter; what takes its place may be none
            setattr(home, leaf, kept)
        elif start is not None:
            getattr(home, leaf).copy_(weight)
        return start

    def _fill(self, pair: Pair, start: tuple[Tensor, Tensor] | None) -> None:
        if start is not None:
            pair.lora_A.copy_(start[0])
            pair.lora_B.copy_(start[1])
            return
        bound = pair.lora_A.shape[-1] ** -0.5
        values = torch.empty(pair.lora_A.shape)
        pair.lora_A.copy_(values.uniform_(-bound, bound, generator=self.generator))


def add_lora(model: ErnieModel, lora: LoRA, *, seed: int, freeze: Freeze | None = None) -> None:
    """Freeze the model and give the projections that are targets a trained pair, in place.

    A is uniform in +-1/sqrt(in), as in PEFT (Kaiming with a = sqrt 5), and B is zero, so that
    training starts from the model as it is; PiSSA's are `principal`. Raises ConfigError for a
    target that matches nothing.
    """
    model.requires_grad_(False)
    prepare = Preparation(lora, weight_names(model), seed=seed, freeze=freeze)
    for block in model.model.layers:
        prepare(block)


def merge_lora(model: ErnieModel) -> None:
    """Add every pair into its weight and take the wrappers out, in place; rounded once, to the
    weight's dtype. Not for a base in few bits.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                child.merge_into(child.base.weight.data, child.base.weight)
            elif isinstance(child, LoRAExperts):
                for leaf in STACKED:
                    if (pair := getattr(child, leaf)) is not None:
                        weight = getattr(child.base, leaf)
                        pair.merge_into(weight.data, weight)
            else:
                continue
            setattr(parent, name, child.base)


@torch.no_grad()
def merge_from(plain: ErnieModel, model: ErnieModel) -> None:
    """Have a plain model compute what `model` does, whatever form its weights and pairs have."""
    beside = {path: pair for path, pair, _ in pairs(model)}
    for path, module in plain.named_modules():
        home = model.get_submodule(path)
        if isinstance(home, (LoRALinear, LoRAExperts)):
            home = home.base
        for leaf, parameter in module.named_parameters(recurse=False):
            weight = getattr(home, leaf)
            pair = beside.get(f"{path}.{leaf}" if leaf in STACKED else path)
            if pair is not None and leaf != "bias":
                pair.merge_into(parameter, weight)
            elif isinstance(weight, Tensor):
                parameter.copy_(weight)
            else:
                stack = parameter if parameter.dim() == 3 else parameter[None]
                for own, matrix in zip(stack, _matrices(weight)):
                    own.copy_(_values(matrix))


def pairs(model: ErnieModel) -> Iterator[tuple[str, Pair, Weight]]:
    """Name, pair and frozen weight of every projection that has one, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module, module.base.weight
        elif isinstance(module, LoRAExperts):
            for leaf in STACKED:
                if (pair := getattr(module, leaf)) is not None:
                    yield f"{path}.{leaf}", pair, getattr(module.base, leaf)


def projections(model: ErnieModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and weight of everything that can have a pair, of a plain model."""
    for number, block in enumerate(model.model.layers):
        for path, _, _, child in _projections(block, f"model.layers.{number}."):
            if isinstance(child, Experts):
                yield from ((f"{path}.{leaf}", getattr(child, leaf)) for leaf in STACKED)
            else:
                yield path, child.weight


def weight_names(model: ErnieModel) -> list[str]:
    return [name for name, _ in projections(model)]


def _projections(
    block: nn.Module, home: str
) -> Iterator[tuple[str, nn.Module, str, Linear | Experts]]:
    """Full name, parent, own name and module of the projections of a plain block."""
    for path, parent in block.named_modules(prefix=home.removesuffix(".")):
        for name, child in parent.named_children():
            if isinstance(child, (Linear, Experts)):
                yield f"{path}.{name}", parent, name, child
