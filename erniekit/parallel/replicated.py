"""Data parallelism with whole weights on every rank; the optimizer's state whole or in shards.

    sharding        gradients           optimizer state       weights
    (none)          summed on all       on every rank         each rank updates all, alike
    stage1          summed at owners    at owners             owners update, then send them

A parameter's owner is one rank of each copy (`owners_of`). Sums are exchanged in buckets of fixed
order and content, the same on all ranks, each as soon as all of it is complete: during the last
backward pass of a step. Nothing is divided: losses are sums times one over the tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ernie.model import ErnieModel
from erniekit.gradients import Gradients, SummedEmbedding, length, squares_of
from erniekit.optim import AdamW
from erniekit.parallel.ranks import Ranks

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel


def owners_of(sizes: Mapping[str, int], num_owners: int) -> dict[str, int]:
    """Which of `num_owners` keeps each parameter's optimizer state, by the numbers of elements:
    largest first, each to the one that has the least.
    """
    loads, owners = [0] * num_owners, {}
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return owners


@dataclass
class Bucket:
    """Parameters whose sums travel together, to `owner` or to all ranks (None)."""

    owner: int | None
    names: list[str] = field(default_factory=list)
    num_bytes: int = 0


def buckets_of(
    parameters: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    owners: Mapping[str, int],
) -> list[Bucket]:
    """Buckets by owner and dtype, in the order in which the last of `parameters` completes each."""
    done: list[Bucket] = []
    filling: dict[tuple[int | None, torch.dtype], Bucket] = {}
    for name in parameters:
        key = (owners.get(name), dtypes[name])
        bucket = filling.setdefault(key, Bucket(key[0]))
        bucket.names.append(name)
        bucket.num_bytes += parameters[name].numel() * dtypes[name].itemsize
        if bucket.num_bytes >= BUCKET_BYTES:
            done.append(filling.pop(key))
    return [*done, *filling.values()]


class ReplicatedGradients(Gradients):
    """`Gradients` that become sums over all ranks within the last backward pass of a step.

    With `owners` a parameter's sum is left at its owner only, and dropped elsewhere.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        *,
        float32_for: tuple[nn.Parameter, ...] = (),
        ranks: Ranks,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(parameters, dtype, float32_for=float32_for)
        self.ranks, self.owners = ranks, owners or {}
        # Summed by the loss and the embedding, so that no hook tells when they are complete.
        self._apart = {id(p) for p in float32_for}
        dtypes = {name: self._dtypes[id(p)] for name, p in self.parameters.items()}
        hooked: dict[str, nn.Parameter] = {}
        apart: dict[str, nn.Parameter] = {}
        for name, parameter in reversed(self.parameters.items()):
            (apart if id(parameter) in self._apart else hooked)[name] = parameter
        self._buckets = [
            bucket for part in (hooked, apart) for bucket in buckets_of(part, dtypes, self.owners)
        ]
        self._bucket_by_name = {n: i for i, b in enumerate(self._buckets) for n in b.names}
        self._missing: list[int] | None = None  # parameters of each bucket yet to come
        self._sent: list[tuple[Bucket, Tensor, dist.Work]] = []
        self._given: set[str] = set()  # the parameters in buckets that got a gradient here

    def expect_last(self) -> None:
        self._missing = [len(bucket.names) for bucket in self._buckets]

    def _take(self, parameter: Tensor) -> None:
        super()._take(parameter)
        if self._missing is None or id(parameter) in self._apart:
            return
        self._missing[self._bucket_by_name[self._names[id(parameter)]]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        sums = []
        for name in bucket.names:
            parameter = self.parameters[name]
            if id(parameter) in self._sums:
                self._given.add(name)
            # A single gradient may still be shorter than its sum is to be.
            total = self.sum_of(parameter).to(self._dtypes[id(parameter)])
            sums.append(total.reshape(-1))
            del self._sums[id(parameter)]  # from here on it is in the bucket
        flat = sums[0] if len(sums) == 1 else torch.cat(sums)
        if bucket.owner is not None and self.ranks.shards == self.ranks.size:
            work = dist.reduce(flat, bucket.owner, async_op=True)
        else:
            work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((bucket, flat, work))

    @torch.no_grad()
    def complete(self) -> None:
        """Send what is left, and wait: where a parameter got no gradient its sum counts as zeros,
        and where it got none on any rank there is no sum, as in one process.
        """
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)
        mine = self.ranks.rank % self.ranks.shards
        for bucket, flat, work in self._sent:
            work.wait()
            parts = flat.split([self.parameters[name].numel() for name in bucket.names])
            for name, part in zip(bucket.names, parts):
                parameter = self.parameters[name]
                if bucket.owner in (None, mine):
                    self._sums[id(parameter)] = part.view(parameter.shape)
        own = torch.tensor([name in self._given for name in self.parameters], dtype=torch.int64)
        [counts] = self.ranks.all_reduce([own])
        for parameter, count in zip(self.parameters.values(), counts.tolist()):
            if not count:
                self._sums.pop(id(parameter), None)
        self._sent, self._given, self._missing = [], set(), None

    @torch.no_grad()
    def norm(self) -> Tensor:
        """As in one process, to the bit: each rank's squares at their places, then one sum."""
        if not self.owners:
            return super().norm()
        squares = placed_squares(self.parameters, self.present())
        return length(list(self.ranks.all_reduce([squares])[0] / self.ranks.copies))


def placed_squares(parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Tensor:
    """Squared length of each parameter's sum, float64 `(parameters,)`; 0 where there is none."""
    place = {name: i for i, name in enumerate(parameters)}
    device = next((total.device for total in sums.values()), None)
    squares = torch.zeros(len(place), dtype=torch.float64, device=device)
    if sums:
        squares[[place[name] for name in sums]] = torch.stack(squares_of(list(sums.values())))
    return squares


class Replicated:
    """The form of a run whose ranks hold all weights; with `shards_state`, stage1.

    One process by itself is the case without an exchange.
    """

    def __init__(self, ranks: Ranks, *, shards_state: bool) -> None:
        self.ranks, self.shards_state = ranks, shards_state
        self.owners: dict[str, int] = {}

    def divide(self, model: ErnieModel) -> None:
        """Weights stay whole."""

    def gradients(
        self, model: ErnieModel, trained: Mapping[str, nn.Parameter], dtype: torch.dtype
    ) -> Gradients:
        """Sums of gradients, and the embedding that adds to them."""
        head, embedding = model.head_weight, model.model.embed_tokens
        apart = (head, embedding.weight)
        if self.ranks.size == 1:
            found = Gradients(trained, dtype, float32_for=apart)
        else:
            sizes = {name: p.numel() for name, p in trained.items()}
            self.owners = owners_of(sizes, self.ranks.shards) if self.shards_state else {}
            found = ReplicatedGradients(
                trained, dtype, float32_for=apart, ranks=self.ranks, owners=self.owners
            )
        if embedding.weight.requires_grad:
            model.model.embed_tokens = SummedEmbedding(embedding, found)
        return found

    @property
    def straight_into_sums(self) -> bool:
        """Whether the loss adds the head's gradient to its sum itself."""
        return True

    def parts(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What the optimizer is given of each parameter."""
        return dict(trained)

    def kept(self) -> set[str] | None:
        """The parameters that this rank's optimizer updates; None: all."""
        mine = self.ranks.rank % self.ranks.shards
        return {n for n, owner in self.owners.items() if owner == mine} if self.owners else None

    def load_state(self, optimizer: AdamW, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over the state of whole parameters that a checkpoint holds."""
        if (kept := self.kept()) is not None:
            tensors = {k: t for k, t in tensors.items() if k.rpartition(".")[0] in kept}
        optimizer.load(tensors, num_updates)

    def whole_state(self, optimizer: AdamW) -> dict[str, Tensor]:
        """On rank 0 the optimizer's state of whole parameters; all ranks must call it."""
        if self.owners:
            return gathered_state(optimizer, self.owners, self.ranks)
        return optimizer.tensors() if self.ranks.is_first else {}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the whole of tensors of the model; all ranks must call it."""
        return dict(tensors) if self.ranks.is_first else {}

    def held(self, parameter: Tensor) -> Tensor:
        """What this rank has of a parameter, on the same memory."""
        return parameter.detach()

    def part_of(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """What this rank has of a whole tensor that is cut as `parameter` is."""
        del parameter
        return whole

    @torch.no_grad()
    def after_update(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Every owner's weights replace the other ranks' of its copy."""
        if not self.owners:
            return
        dtypes = {name: parameter.dtype for name, parameter in trained.items()}
        sent: list[tuple[Bucket, Tensor, dist.Work]] = []
        for bucket in buckets_of(trained, dtypes, self.owners):
            sent.append(self._broadcast(bucket, trained))
            if len(sent) > 1:  # one on its way while the next is packed
                self._unpack(*sent.pop(0), trained)
        for one in sent:
            self._unpack(*one, trained)

    def _broadcast(
        self, bucket: Bucket, trained: Mapping[str, nn.Parameter]
    ) -> tuple[Bucket, Tensor, dist.Work]:
        assert self.ranks.mesh is not None
        flat = torch.cat([trained[name].data.view(-1) for name in bucket.names])
        group = self.ranks.mesh["shard"].get_group()
        work = dist.broadcast(flat, group=group, group_src=bucket.owner, async_op=True)
        assert work is not None
        return bucket, flat, work

    def _unpack(
        self, bucket: Bucket, flat: Tensor, work: dist.Work, trained: Mapping[str, nn.Parameter]
    ) -> None:
        work.wait()
        if bucket.owner != self.ranks.rank % self.ranks.shards:
            weights = [trained[name].data for name in bucket.names]
            for weight, part in zip(weights, flat.split([w.numel() for w in weights])):
                weight.view(-1).copy_(part)


def gathered_state(optimizer: AdamW, owners: Mapping[str, int], ranks: Ranks) -> dict[str, Tensor]:
    """On rank 0 the state of all parameters, in the host's memory; {} on the others."""
    found: dict[str, Tensor] = {}
    for name in optimizer.parameters:
        owner = owners[name]
        if ranks.rank not in (0, owner):
            continue
        state = optimizer.state[name] if owner == ranks.rank else optimizer.new_state(name)
        device = optimizer.parameters[name].device  # where ranks meet; the state may lie elsewhere
        for key, tensor in state.items():
            tensor = tensor.to(device)
            if owner == ranks.rank != 0:
                dist.send(tensor, 0)
            elif owner != 0:
                dist.recv(tensor, owner)
            if ranks.is_first:
                found[f"{name}.{key}"] = tensor.cpu()
    return found
