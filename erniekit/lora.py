"""LoRA: small trained matrices beside frozen weights, put in by a walk over the model.

    y = x W' + scale * (x A') B'        A (r, in) random, B (out, r) zero, both float32

Every attention and feed-forward projection gets a pair, and so does every routed expert (stacked,
like the experts). Embedding, head, router and norms stay as they are. Files are those of the PEFT
library for `Linear` layers, which loads them beside the same model in transformers; the stacked
pairs of experts carry the same naming but are known to this module only.

Legend: T tokens, N rows sorted by expert, E experts, I/O in/out width, r rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.layers import Linear
from ernie.model import ErnieModel
from ernie.moe.experts import Experts
from ernie.settings import ConfigError

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """Rank and scale of an adapter."""

    rank: int
    alpha: float
    is_rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


class LoRALinear(nn.Module):
    """A frozen `Linear` with a trained pair beside it."""

    def __init__(self, base: Linear, lora: LoRA) -> None:
        super().__init__()
        out_size, in_size = base.weight.shape
        device = base.weight.device
        self.base, self.scale = base, lora.scale
        self.lora_A = nn.Parameter(torch.zeros(lora.rank, in_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_size, lora.rank, device=device))

    def forward(self, x_TI: Tensor) -> Tensor:
        low_Tr = kernels.linear(x_TI, self.lora_A) * self.scale
        return self.base(x_TI) + kernels.linear(low_Tr, self.lora_B)

    @torch.no_grad()
    def merge(self) -> Linear:
        """The base with the pair added into its weight; the sum is rounded once, to its dtype."""
        delta_OI = self.scale * (self.lora_B @ self.lora_A)
        self.base.weight.copy_(self.base.weight.float() + delta_OI)
        return self.base


class LoRAExpertsProjection(nn.Module):
    """The pairs of one stacked projection: A `(E, r, I)`, B `(E, O, r)`."""

    def __init__(self, weight_EOI: Tensor, lora: LoRA) -> None:
        super().__init__()
        num_experts, out_size, in_size = weight_EOI.shape
        device = weight_EOI.device
        self.scale = lora.scale
        self.lora_A = nn.Parameter(torch.zeros(num_experts, lora.rank, in_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, out_size, lora.rank, device=device))

    def forward(self, x_NI: Tensor, counts_E: Tensor) -> Tensor:
        low_Nr = kernels.grouped_linear(x_NI, self.lora_A, counts_E) * self.scale
        return kernels.grouped_linear(low_Nr, self.lora_B, counts_E)


class LoRAExperts(nn.Module):
    """Frozen `Experts` with trained pairs beside both projections of each expert."""

    def __init__(self, base: Experts, lora: LoRA) -> None:
        super().__init__()
        self.base = base
        self.gate_up_proj = LoRAExpertsProjection(base.gate_up_proj, lora)
        self.down_proj = LoRAExpertsProjection(base.down_proj, lora)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        gate_up = kernels.grouped_linear(x_ND, self.base.gate_up_proj, counts_E)
        inner_NM = kernels.swiglu_halves(gate_up + self.gate_up_proj(x_ND, counts_E))
        out_ND = kernels.grouped_linear(inner_NM, self.base.down_proj, counts_E)
        return out_ND + self.down_proj(inner_NM, counts_E)

    @torch.no_grad()
    def merge(self) -> Experts:
        for name in ("gate_up_proj", "down_proj"):
            pair, weight_EOI = getattr(self, name), getattr(self.base, name)
            for e in range(len(weight_EOI)):
                delta_OI = pair.scale * (pair.lora_B[e] @ pair.lora_A[e])
                weight_EOI[e].copy_(weight_EOI[e].float() + delta_OI)
        return self.base


def add_lora(model: ErnieModel, lora: LoRA, *, seed: int) -> None:
    """Freeze the model and give every projection of its blocks a trained pair, in place.

    A is uniform in +-1/sqrt(in), as in PEFT (Kaiming with a = sqrt 5); B is zero, so that training
    starts from the model as it is.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, child in list(projections(model)):
        wrapped = (
            LoRAExperts(child, lora) if isinstance(child, Experts) else LoRALinear(child, lora)
        )
        setattr(parent, name, wrapped)
        for key, parameter in wrapped.named_parameters():
            if key.endswith("lora_A"):
                bound = parameter.shape[-1] ** -0.5
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.data.copy_(values)


@contextmanager
def without_adapters(model: ErnieModel) -> Iterator[None]:
    """Inside, the model computes what it computed before `add_lora`, exactly."""
    kinds = (LoRALinear, LoRAExpertsProjection)
    adapters = [module for module in model.modules() if isinstance(module, kinds)]
    scales = [adapter.scale for adapter in adapters]
    for adapter in adapters:
        adapter.scale = 0.0
    try:
        yield
    finally:
        for adapter, scale in zip(adapters, scales, strict=True):
            adapter.scale = scale


def merge_lora(model: ErnieModel) -> None:
    """Add every pair into its weight and take the wrappers out, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LoRALinear, LoRAExperts)):
                setattr(parent, name, child.merge())


def projections(model: ErnieModel) -> Iterator[tuple[nn.Module, str, Linear | Experts]]:
    """Parent, name and module of everything that gets a pair."""
    for block in model.model.layers:
        for parent in block.modules():
            for name, child in parent.named_children():
                if isinstance(child, (Linear, Experts)):
                    yield parent, name, child


# --- files ---


def file_name(parameter: str) -> str:
    """The name in the file of a parameter of a pair."""
    return f"{_PREFIX}{parameter}.weight"


def parameter_name(in_file: str) -> str:
    """The way back from `file_name`."""
    return in_file.removeprefix(_PREFIX).removesuffix(".weight")


def adapter_tensors(model: ErnieModel) -> dict[str, Tensor]:
    """The pairs under their names in the file."""
    return {
        file_name(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(("lora_A", "lora_B"))
    }


def adapter_config(model: ErnieModel, lora: LoRA, base: str) -> str:
    """The text of `adapter_config.json`."""
    wrapped = (n for n, m in model.named_modules() if isinstance(m, LoRALinear))
    targets = sorted({name.rpartition(".")[2] for name in wrapped})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.is_rank_stabilised,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(values, indent=2) + "\n"


def with_base(config: str, base: str) -> str:
    """The text of an `adapter_config.json`, for another folder or name of the base model."""
    values = json.loads(config)
    values["base_model_name_or_path"] = base or values.get("base_model_name_or_path")
    return json.dumps(values, indent=2) + "\n"


def read_adapter_config(folder: str | Path) -> LoRA:
    """Rank and scale of a saved adapter; raises ConfigError where there is none."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LoRA(int(values["r"]), float(values["lora_alpha"]), bool(values.get("use_rslora")))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no {ADAPTER_CONFIG}; give a LoRA checkpoint") from None
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not an adapter's configuration ({error!r})") from None


def load_adapter(model: ErnieModel, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Fill the pairs of a model from a file's tensors.

    Raises ConfigError naming the first tensor that is missing, left over or of another shape:
    an adapter that would silently do nothing is refused.
    """
    expected = adapter_tensors(model)
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            where = "missing in" if name not in tensors else "unknown to this model but in"
            raise ConfigError(f"{name} is {where} {origin}; the adapter belongs to another model")
        if tensors[name].shape != expected[name].shape:
            raise ConfigError(
                f"{name} in {origin} is {tuple(tensors[name].shape)}; this model and rank want "
                f"{tuple(expected[name].shape)}"
            )
        expected[name].copy_(tensors[name])
