"""Which form of data parallelism a run has, from ERNIEKit's key `sharding`.

A form walks over a built model and says what the loop needs to know of it: sums of gradients, parts
for the optimizer, and whole tensors for a checkpoint, the same on any number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ernie.settings import ConfigError
from erniekit.config import Run
from erniekit.parallel.ranks import Ranks
from erniekit.parallel.replicated import Replicated

if TYPE_CHECKING:
    from erniekit.parallel.sharded import Sharded

    Form: TypeAlias = Replicated | Sharded


def form_of(run: Run, ranks: Ranks) -> Form:
    """The form of a run; raises ConfigError for settings that cannot go with it."""
    stage = run.parallel.sharding if ranks.shards > 1 else None
    if ranks.size > 1 and run.optimisation.optimizer_in_backward:
        raise ConfigError(
            f"optimizer_in_backward cannot go with {ranks.size} processes, whose gradients are "
            "summed first; leave it out"
        )
    if stage in ("stage2", "stage3"):
        optim = run.optimisation.optim
        if optim in ("muon", "adamw_8bit"):
            raise ConfigError(
                f"optim={optim} needs whole parameters, which sharding={stage} cuts; use "
                "sharding: stage1, or optim: adamw"
            )
        from erniekit.parallel.sharded import Sharded

        return Sharded(ranks, keep_whole_in_step=stage == "stage2")
    return Replicated(ranks, shards_state=ranks.shards > 1)
