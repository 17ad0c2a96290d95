"""Whether a merged model is what its base and adapter compute, asked of the files as written.

Before the merge a few columns of every adapted weight are read off the adapter itself: unit vectors
go through it as rows do in training. After the model is saved, its files are read again, through
the table of their layout, and compared. Rounding to the dtype of the weights explains a difference
of half a last place of each value; more is an error, and the files are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie.checkpoint.io import open_weights
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit.lora import LoRAExperts, LoRALinear, pairs

log = logging.getLogger("erniekit")

NUM_COLUMNS = 8  # of each matrix
_SUMS = 1e-5  # what float32 sums of another order explain, of a weight's largest value


@dataclass(frozen=True)
class Sample:
    """Columns of an adapted weight: `values` float32 `(C, O)`, or `(E, C, O)` of a stack."""

    name: str  # of the parameter in the merged model
    columns: Tensor
    values: Tensor


@torch.no_grad()
def samples(model: ErnieModel) -> list[Sample]:
    """Columns of every adapted weight, at places of its own for each."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for name, _, weight in pairs(model):
        in_size = weight.shape[-1]
        columns = torch.randperm(in_size, generator=generator)[:NUM_COLUMNS].sort().values
        units_CI = torch.eye(in_size)[columns]
        home, _, leaf = name.rpartition(".")
        module, parent = model.get_submodule(name), model.get_submodule(home)
        if isinstance(parent, LoRAExperts):
            num_experts = weight.shape[0]
            counts_E = torch.full((num_experts,), len(columns))
            out = parent.project(leaf, units_CI.repeat(num_experts, 1), counts_E)
            found.append(Sample(name, columns, out.unflatten(0, (num_experts, -1))))
        else:
            assert isinstance(module, LoRALinear)
            out = module(units_CI)
            out = out if module.base.bias is None else out - module.base.bias.float()
            found.append(Sample(f"{name}.weight", columns, out))
    return found


@torch.no_grad()
def check(folder: Path, expected: Sequence[Sample]) -> float:
    """The largest difference between a saved model and samples of it, which is also told.

    Raises ConfigError, and removes the weights of the folder, for one that rounding does not
    explain.
    """
    waiting = {sample.name: sample for sample in expected}
    worst, place, dtype = 0.0, "", torch.float32
    for name, weight in open_weights(folder)[1]:
        sample = waiting.pop(name, None)
        if sample is None:
            continue
        found = weight[..., sample.columns].mT.float()
        gaps = (found - sample.values).abs()
        half_place = torch.finfo(weight.dtype).eps / 2
        allowed = half_place * sample.values.abs().maximum(found.abs())
        allowed += _SUMS * sample.values.abs().max() + torch.finfo(weight.dtype).tiny
        if not bool((gaps <= allowed).all()):  # also where one is not a number
            at = (gaps / allowed).nan_to_num(torch.inf).argmax()
            _refuse(folder, f"{name} differs by {float(gaps.flatten()[at]):.1e} from what its base "
                    f"and adapter compute, where rounding to {str(weight.dtype)[6:]} explains "
                    f"{float(allowed.flatten()[at]):.1e}")  # fmt: skip
        if float(gaps.max()) >= worst:
            worst, place, dtype = float(gaps.max()), name, weight.dtype
    if waiting:
        _refuse(folder, f"{len(waiting)} merged weights, {next(iter(waiting))} first, are missing")
    log.info(
        "the merged weights differ from base and adapter by %.1e at most (in %s), within the "
        "rounding of %s; %d columns of each of %d weights were compared",
        worst, place, str(dtype)[6:], NUM_COLUMNS, len(expected),
    )  # fmt: skip
    return worst


def _refuse(folder: Path, what: str) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    raise ConfigError(
        f"the merge in {folder} is wrong and was removed: {what}; export again, and if that fails "
        "the base or the adapter is damaged"
    )
