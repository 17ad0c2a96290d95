"""Optimizers, what they remember, and the learning rate at each step.

`AdamW`, `AdamW8bit` (moments of one byte) and `Muon` (matrices by direction alone).

Parameters are grouped by what differs between them: decay (never for norms, biases and other
vectors) and a factor on the learning rate (LoRA+, layers, routers). The arithmetic is
`ernie.kernels.adamw_step`, one pass over each tensor. A bfloat16 parameter (GPU) gets a float32
original that is updated in its place, so that no update is too small to count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.kernels.reference import MOMENT_BLOCK
from ernie.settings import ConfigError
from erniekit.config import Optimisation
from erniekit.reward_model import HEAD as REWARD_HEAD

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_TOWER_BLOCK = re.compile(r"^vision_model\.blocks\.(\d+)\.")
_GATES = ("mlp.gate.weight", "mlp.vision_gate.weight")
AVERAGE = "average"  # part of a parameter's state


def learning_rate_at(step: int, num_steps: int, o: Optimisation) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of a run of `num_steps`.

    Source: PaddleFormers' schedules.
    """
    kind, _, steady = o.lr_scheduler_type.partition(":")
    warmup = warmup_steps(num_steps, o)
    peak, floor = o.learning_rate, o.min_lr
    if kind != "constant" and step < warmup:
        return peak * step / warmup
    length = (o.decay_steps or num_steps) - warmup
    progress = min((step - warmup) / max(length, 1), 1.0)
    if kind in ("constant", "constant_with_warmup"):
        return peak
    if kind == "linear":
        return max(peak * (1 - progress), floor)
    if kind == "cosine":
        share = max(0.0, 0.5 * (1 + math.cos(2 * math.pi * o.num_cycles * progress)))
        return floor + (peak - floor) * share
    if kind == "polynomial":
        return o.lr_end + (peak - o.lr_end) * (1 - progress) ** o.power
    assert kind == "wsd", kind
    until = max(int(steady) if steady else int(0.9 * num_steps), warmup)
    return _decayed(step - until, num_steps - until, o)


def _decayed(step: int, num_steps: int, o: Optimisation) -> float:
    """Last part of `wsd`: from the peak at 0 to the floor at `num_steps`."""
    progress = min(max(step, 0) / max(num_steps, 1), 1.0)
    if o.decay_function == "1-sqrt":
        share = 1 - math.sqrt(progress)
    else:  # 0.05 ** progress, stretched to go from 1 to 0
        share = (0.05**progress - 0.05) / 0.95
    return o.min_lr + (o.learning_rate - o.min_lr) * share


def warmup_steps(num_steps: int, o: Optimisation) -> int:
    return o.warmup_steps or math.ceil(o.warmup_ratio * num_steps)


MAGNITUDE = "lora_magnitude_vector"  # of a row, also where they are stacked by expert


@dataclass(frozen=True)
class Treatment:
    """How one parameter is updated: factor on the learning rate, and weight decay."""

    factor: float
    weight_decay: float


def treatments(
    parameters: Mapping[str, nn.Parameter],
    o: Optimisation,
    *,
    num_layers: int,
    num_tower_blocks: int = 0,
    lora_plus_scale: float = 1.0,
) -> dict[str, Treatment]:
    """By name: vectors are not decayed; LoRA's B, low layers, routers and the vision tower have
    their own factors.
    """
    result = {}
    for name, parameter in parameters.items():
        factor = lora_plus_scale if name.endswith("lora_B") else 1.0
        if o.layerwise_lr_decay_bound != 1.0:
            factor *= _layer_factor(name, num_layers, o.layerwise_lr_decay_bound)
        if o.moe_gate_lr_ratio is not None and name.endswith(_GATES):
            factor *= o.moe_gate_lr_ratio
        if name.startswith("vision_model."):
            factor *= _tower_factor(name, num_tower_blocks, o)
        is_matrix = parameter.dim() > 1 and not name.endswith(MAGNITUDE)
        result[name] = Treatment(factor, o.weight_decay if is_matrix else 0.0)
    return result


def _layer_factor(name: str, num_layers: int, bound: float) -> float:
    """`bound` at the embedding and the lowest layer, 1 at the head, linear between, with three
    steps from the uppermost layer to the head. Source: ERNIEKit's optimizers of SFT and DPO.
    """
    layer = _LAYER.search(name)
    depth = int(layer[1]) if layer else 0 if "embed_tokens" in name else num_layers + 2
    return bound + (1 - bound) * depth / (num_layers + 2)


def _tower_factor(name: str, num_blocks: int, o: Optimisation) -> float:
    """`vit_lr_ratio`, times `visual_ld` once for the uppermost block, twice for the one under it
    and so on down to the patch embedding. Source: layer decay of BEiT.
    """
    block = _TOWER_BLOCK.search(name)
    depth = int(block[1]) + 1 if block else 0 if ".patch_embed." in name else num_blocks + 1
    ratio = 1.0 if o.vit_lr_ratio is None else o.vit_lr_ratio
    return ratio * (1.0 if o.visual_ld is None else o.visual_ld) ** (num_blocks + 1 - depth)


class AdamW:
    """AdamW over named parameters. All state is made at once, so that memory does not grow later.

    `moment_dtype` bfloat16 halves the state; its rounding is random and without bias, and repeats
    exactly, since it depends only on (seed, step, parameter, element). With `kept` there is state
    for those parameters only, and the others are not updated.

    With `offload_optim` the state of parameters on a GPU, but for averages, lies in pinned memory
    of the host; that of one parameter is on the GPU while it is updated.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        treatments: Mapping[str, Treatment],
        o: Optimisation,
        *,
        seed: int,
        kept: Collection[str] | None = None,
    ) -> None:
        self.parameters, self.treatments, self.o = dict(parameters), dict(treatments), o
        self.moment_dtype = torch.bfloat16 if o.use_lowprecision_moment else torch.float32
        self.seed = seed
        self.num_updates = 0
        self.is_offloaded = o.offload_optim and _on_gpu(self.parameters)
        self._index = {name: index for index, name in enumerate(self.parameters)}
        names = (name for name in self.parameters if kept is None or name in kept)
        self.state = {name: self._at_rest(self.new_state(name)) for name in names}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float) -> None:
        """Update every parameter that has a gradient; gradients are multiplied with `scale`."""
        self.num_updates += 1
        for name in self.state:
            if name in gradients:
                self.update(name, gradients[name], learning_rate, scale)

    @torch.no_grad()
    def update(self, name: str, gradient: Tensor, learning_rate: float, scale: float) -> None:
        """Update one parameter as a part of update number `num_updates`, counted by the caller."""
        rate = learning_rate * self.treatments[name].factor
        if not self.is_offloaded:
            self._move(name, self.state[name], gradient, rate, scale)
            return
        resting = {key: t for key, t in self.state[name].items() if key != AVERAGE}
        device = self.parameters[name].device
        state = {k: t.to(device, non_blocking=True, copy=True) for k, t in resting.items()}
        self._move(name, state, gradient, rate, scale)
        for key, tensor in state.items():
            resting[key].copy_(tensor, non_blocking=True)

    def exact(self, name: str) -> Tensor:
        """The float32 weight of a parameter: its original where it has one, else itself."""
        return self._weights(name, self.state[name]).to(self.parameters[name].device)

    def _move(
        self, name: str, state: Mapping[str, Tensor], gradient: Tensor, rate: float, scale: float
    ) -> None:
        """Update a parameter and its state, which is on the same device."""
        weights, moments = self._weights(name, state), (state["moment"], state["square"])
        update = self._update_of(name, rate, scale)
        kernels.adamw_step(weights, gradient, *moments, update, self._short(name))

    def _weights(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        return state.get("original", self.parameters[name].data)

    def _short(self, name: str) -> Tensor | None:
        """The parameter, where what is updated is its original."""
        return self.parameters[name].data if "original" in self.state[name] else None

    def _update_of(self, name: str, rate: float, scale: float) -> kernels.AdamWUpdate:
        return kernels.AdamWUpdate(
            learning_rate=rate,
            beta1=self.o.adam_beta1,
            beta2=self.o.adam_beta2,
            eps=self.o.adam_epsilon,
            weight_decay=self.treatments[name].weight_decay,
            step=self.num_updates,
            grad_scale=scale,
            seed=(self.seed * 1_000_003 + self._index[name]) & 0xFFFFFFFF,
        )

    def new_state(self, name: str) -> dict[str, Tensor]:
        """What is remembered of a parameter before the first update."""
        parameter = self.parameters[name]
        state = self._new_moments(name) | self._new_original(parameter)
        if self.o.ema_decay:  # kept by `erniekit.average`, and gathered with the rest
            state[AVERAGE] = parameter.detach().to(torch.float32, copy=True)
        return state

    def _at_rest(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state where it lies between updates."""
        if not self.is_offloaded:
            return state
        return {k: t if k == AVERAGE else t.cpu().pin_memory() for k, t in state.items()}

    def _new_moments(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        return {
            key: torch.zeros_like(parameter, dtype=self.moment_dtype)
            for key in ("moment", "square")
        }

    def _new_original(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        is_exact = parameter.dtype == torch.float32
        return {} if is_exact else {"original": parameter.detach().float()}

    def tensors(self) -> dict[str, Tensor]:
        """The state by `<parameter>.<moment|square|scales|original|average>`, for a checkpoint."""
        if self.is_offloaded:
            torch.cuda.synchronize()  # what is on its way to the host
        return {
            f"{name}.{key}": t for name, state in self.state.items() for key, t in state.items()
        }

    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over a state made by `tensors()`, without averages, which are a checkpoint's own
        part; ConfigError for that of another optimizer.
        """
        own = (key for key in self.tensors() if not key.endswith(f".{AVERAGE}"))
        if tensors.keys() != set(own):
            raise ConfigError(
                f"the checkpoint's optimizer state does not fit optim={self.o.optim} and the "
                "trained weights; give the optim of the checkpoint, or another output_dir"
            )
        self.num_updates = num_updates
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            self.state[name][part].copy_(tensor)


def _on_gpu(parameters: Mapping[str, nn.Parameter]) -> bool:
    return any(p.is_cuda for p in parameters.values())


class AdamW8bit(AdamW):
    """AdamW that remembers 2 bytes and a bit for a weight; see `ernie.kernels.adamw_8bit_step`."""

    def _new_moments(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        blocks = -(-parameter.numel() // MOMENT_BLOCK)
        return {
            "moment": torch.zeros_like(parameter, dtype=torch.int8),
            "square": torch.zeros_like(parameter, dtype=torch.uint8),
            "scales": torch.zeros(2, blocks, dtype=torch.float32, device=parameter.device),
        }

    def _move(
        self, name: str, state: Mapping[str, Tensor], gradient: Tensor, rate: float, scale: float
    ) -> None:
        weights = self._weights(name, state)
        moments = (state["moment"], state["square"], state["scales"])
        update = self._update_of(name, rate, scale)
        kernels.adamw_8bit_step(weights, gradient, *moments, update, self._short(name))


_BY_ADAMW = (
    *("embed_tokens.weight", "lm_head.weight", REWARD_HEAD, *_GATES),
    *("lora_A", "lora_B", MAGNITUDE),
)


def is_matrix(name: str, num_dims: int) -> bool:
    """Whether Muon takes a parameter for a matrix; the others it leaves to AdamW."""
    return num_dims > 1 and not name.endswith(_BY_ADAMW)


class Muon(AdamW):
    """Matrices move along the orthogonal factor of their averaged gradient; the rest by AdamW.

    The rest is vectors, embedding, heads, routers and adapters. A matrix remembers one moment
    (float32) and its steps are scaled to the usual size of AdamW's, so one learning rate serves
    both. A stack of experts is taken expert by expert.

    Source: Jordan et al., "Muon", 2024; Liu et al., arXiv:2502.16982 (step size, decay).
    """

    def _is_matrix(self, name: str) -> bool:
        return is_matrix(name, self.parameters[name].dim())

    def _new_moments(self, name: str) -> dict[str, Tensor]:
        if not self._is_matrix(name):
            return super()._new_moments(name)
        return {"moment": torch.zeros_like(self.parameters[name], dtype=torch.float32)}

    def _move(
        self, name: str, state: Mapping[str, Tensor], gradient: Tensor, rate: float, scale: float
    ) -> None:
        if not self._is_matrix(name):
            super()._move(name, state, gradient, rate, scale)
            return
        weights, moment, beta = self._weights(name, state), state["moment"], self.o.muon_momentum
        gradient = gradient.float() * scale
        moment.lerp_(gradient, 1 - beta)
        matrices = gradient.lerp(moment, beta)
        step_size = 0.2 * math.sqrt(max(weights.shape[-2:]))
        weights.mul_(1 - rate * self.treatments[name].weight_decay)
        weights.sub_(orthogonal(matrices).view_as(weights), alpha=rate * step_size)
        if "original" in state:
            self.parameters[name].data.copy_(weights)


def orthogonal(x_OI: Tensor) -> Tensor:
    """About `U V'` of `x = U S V'`, of a matrix or a batch: singular values end at 0.7 to 1.2.

    Five steps of Newton-Schulz, in bfloat16 on a GPU and float32 on a CPU.
    Source: Jordan et al., "Muon", 2024.
    """
    is_tall = x_OI.shape[-2] > x_OI.shape[-1]
    x = (x_OI.mT if is_tall else x_OI).to(torch.bfloat16 if x_OI.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).float().contiguous()


OPTIMIZERS = {"adamw": AdamW, "adamw_custom": AdamW, "adamw_8bit": AdamW8bit, "muon": Muon}


def clip_scale(norm: float, max_norm: float) -> float:
    """Factor for gradients of this norm that bounds it by `max_norm` (0: no bound)."""
    return max_norm / (norm + 1e-6) if max_norm and norm > max_norm else 1.0
