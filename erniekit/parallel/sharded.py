"""Weights, gradients and optimizer state in shards: a walk that hands a model to FSDP2.

    stage2    weights are whole from a step's forward pass to its backward pass
    stage3    weights are whole only while their block computes

Every block is gathered by itself; embedding, final norm and head together stay whole from the
forward pass to the backward pass, as the loss needs the head in between. Parameters become DTensors
cut along their first dimension; the optimizer is given this rank's parts and knows nothing of it.
Routers, their bias and a reward head, small and float32, stay whole everywhere.

Gradients come through autograd alone, the vocabulary's too, so that FSDP2 can sum and cut them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ernie.model import KEPT_FLOAT32, Block, ErnieModel
from erniekit.gradients import Gradients, length
from erniekit.optim import AdamW
from erniekit.parallel.ranks import Ranks
from erniekit.parallel.replicated import placed_squares
from erniekit.reward_model import HEAD


def shard(model: ErnieModel, ranks: Ranks, *, keep_whole_in_step: bool) -> None:
    """Cut the weights of `model` over the ranks, in place, and move them to their device.

    `keep_whole_in_step` is stage2.
    """
    assert ranks.mesh is not None
    kept = (*KEPT_FLOAT32, HEAD)
    whole = {p for name, p in model.named_parameters() if name.endswith(kept)}
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.mesh.device_type)
    cut = partial(
        fully_shard,
        mesh=ranks.mesh if ranks.copies > 1 else ranks.mesh["shard"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        ignored_params=whole,
    )
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        cut(block, reshard_after_forward=not keep_whole_in_step)
    cut(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are scaled by the tokens of all ranks, so gradients are sums, not means.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


class ShardedGradients(Gradients):
    """`Gradients` of this rank's parts, which FSDP2 has summed over the ranks, and of the whole
    parameters, summed here.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, *, ranks: Ranks
    ) -> None:
        super().__init__(parameters, dtype)
        self.ranks = ranks
        self._whole = {n: p for n, p in self.parameters.items() if not isinstance(p, DTensor)}

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(_local(parameter), dtype=self._dtypes[id(parameter)])

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        super()._add(parameter, _local(gradient))

    @torch.no_grad()
    def complete(self) -> None:
        for dtype in {self._dtypes[id(p)] for p in self._whole.values()}:
            alike = [p for p in self._whole.values() if self._dtypes[id(p)] == dtype]
            flat = torch.cat([self.sum_of(p).to(dtype).view(-1) for p in alike])
            dist.all_reduce(flat)
            for parameter, part in zip(alike, flat.split([p.numel() for p in alike])):
                self._sums[id(parameter)] = part.view(parameter.shape)

    @torch.no_grad()
    def norm(self) -> Tensor:
        sums = self.present()
        if self.ranks.rank % self.ranks.shards:  # whole ones count once
            sums = {name: total for name, total in sums.items() if name not in self._whole}
        squares = placed_squares(self.parameters, sums)
        return length(list(self.ranks.all_reduce([squares])[0] / self.ranks.copies))


class Sharded:
    """The form of a run whose ranks hold parts of the weights: stage2 and stage3."""

    def __init__(self, ranks: Ranks, *, keep_whole_in_step: bool) -> None:
        self.ranks, self.keep_whole_in_step = ranks, keep_whole_in_step
        self.model: ErnieModel | None = None
        self.trained: dict[str, nn.Parameter] = {}

    straight_into_sums = False

    def divide(self, model: ErnieModel) -> None:
        """Cut the weights over the ranks, in place."""
        shard(model, self.ranks, keep_whole_in_step=self.keep_whole_in_step)
        self.model = model

    def gradients(
        self, model: ErnieModel, trained: Mapping[str, nn.Parameter], dtype: torch.dtype
    ) -> Gradients:
        """Sums of this rank's parts of the gradients."""
        return ShardedGradients(trained, dtype, ranks=self.ranks)

    def parts(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """This rank's part of each parameter, on the same memory."""
        self.trained = dict(trained)
        return {n: nn.Parameter(_local(p), requires_grad=False) for n, p in trained.items()}

    def kept(self) -> None:
        """Every rank updates its part of everything."""

    def load_state(self, optimizer: AdamW, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Take this rank's parts of the state of whole parameters that a checkpoint holds."""
        parts = {k: _cut_like(t, self._home(k)).to(t.device) for k, t in tensors.items()}
        optimizer.load(parts, num_updates)

    def whole_state(self, optimizer: AdamW) -> dict[str, Tensor]:
        """On rank 0 the optimizer's state of whole parameters; all ranks must call it."""
        found: dict[str, Tensor] = {}
        for key, part in optimizer.tensors().items():  # one at a time on the device
            found |= self.whole({key: _as_part_of(self._home(key), part)})
        return found

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the whole of tensors of the model, in the host's memory; all ranks must call
        it.
        """
        found = {}
        for name, tensor in tensors.items():
            whole = _gathered(tensor) if isinstance(tensor, DTensor) else tensor
            if whole is not None and self.ranks.is_first:
                found[name] = whole.detach().cpu()
        return found

    def held(self, parameter: Tensor) -> Tensor:
        """What this rank has of a parameter, on the same memory."""
        return _local(parameter)

    def part_of(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """What this rank has of a whole tensor that is cut as `parameter` is."""
        return _cut_like(whole, parameter)

    def after_update(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Weights are gathered when they are next needed."""

    def _home(self, key: str) -> Tensor | None:
        """The parameter of `<parameter>.<part of its state>`."""
        return self.trained.get(key.rpartition(".")[0])


@torch.no_grad()
def _gathered(tensor: DTensor) -> Tensor | None:
    """On rank 0 the whole of a tensor that is cut along its first dimension.

    Not by `full_tensor`: only rank 0 needs the whole, and only its copy of the model has to send.
    Nor does gloo survive that exchange for ever: its two threads write the name of what each ended
    last into one string without a lock (torch 2.13, `ProcessGroupGloo::runLoop`), and names of more
    than 15 letters, as that exchange has, lie on the heap and can be freed twice.
    """
    group = tensor.device_mesh.get_group("shard")
    members = dist.get_process_group_ranks(group)
    if members[0] != 0:
        return None
    rows, local = tensor.shape[0], tensor.to_local()
    padded = local.new_zeros(-(-rows // len(members)), *tensor.shape[1:])  # FSDP2 cuts so
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in members] if dist.get_rank() == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    return torch.cat(parts)[:rows] if parts is not None else None


def _as_part_of(parameter: Tensor | None, part: Tensor) -> Tensor:
    """A DTensor that is cut as `parameter` is, and of which this rank has `part`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(parameter.device), parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def _cut_like(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """This rank's part of a tensor that all ranks have, cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, mesh, placements, src_data_rank=None).to_local()
