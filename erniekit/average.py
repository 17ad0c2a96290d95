"""The running average of the trained weights (EMA), which often does better than the last ones.

    average <- decay * average + (1 - decay) * weights        after every update, from the start

It is float32 whatever the weights are: in bfloat16 a decay of 0.999 would change nothing. It counts
about the last 1 / (1 - decay) steps. Of LoRA, A and B are averaged each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ernie.settings import ConfigError
from erniekit.optim import AVERAGE, AdamW


class Average:
    """The averages lie in the optimizer's state, float32: of what this rank's optimizer updates.

    They begin with the weights as they are now.
    """

    def __init__(self, optimizer: AdamW, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        for name, average in self.tensors.items():
            average.copy_(optimizer.exact(name))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By parameter, on the device of the weights."""
        return {name: state[AVERAGE] for name, state in self.optimizer.state.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an update."""
        for name, average in self.tensors.items():
            average.lerp_(self.optimizer.exact(name), 1 - self.decay)

    def load(self, tensors: Iterable[tuple[str, Tensor]], origin: str) -> None:
        """Go on from averages that were saved; what is not averaged here is left alone."""
        averages = self.tensors
        missing = set(averages)
        for name, tensor in tensors:
            if name in averages:
                averages[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise ConfigError(
                f"{origin} has no {min(missing)}; give a checkpoint of a run that trains the same"
            )
