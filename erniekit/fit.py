"""What a run computes again so that it fits: `recompute_granularity: auto`.

Attention and feed-forward of every layer, and the blocks of a vision tower, are taken in the order
of bytes freed per operation done again, lower layers first, which are freed at more moments of a
step; so many of them that the plan fits, less those without which it still does. Operations stand
for milliseconds: the parts are products of about one speed. Which frees more for its time depends
on the run: attention where rows are short, feed-forwards where they are long. Both of a layer
together are the whole block.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch

from ernie.config import ErnieConfig
from ernie.host import cgroup_bytes, memory_bytes
from erniekit.build import config_of
from erniekit.config import Run
from erniekit.config.model import TOWER, parts_again
from erniekit.launch import ranks_here
from erniekit.plan import (
    GIB,
    Degrees,
    again_flops,
    kept_words,
    picture_words,
    plan,
    planner,
    tower_again_flops,
)

log = logging.getLogger("erniekit")

# Of this machine's memory, what `auto` takes a plan to be free to fill: it may be 10 % off.
SHARE = 0.9


def memory_for(run: Run, device: str) -> int:
    """Bytes for a rank: `plan_memory_gib`, or its share of this machine (or of the container that
    it is in), or its GPU; an H100 of 80 GB where there is none.
    """
    if run.training.plan_memory_gib:
        return int(run.training.plan_memory_gib * GIB)
    if device == "cpu":
        total, limit = memory_bytes(), cgroup_bytes("memory.max")
        return (total if limit is None else min(total, limit)) // (ranks_here(run) or 1)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(80e9)


def limit_of(run: Run, device: str) -> int:
    """Bytes that `auto` may fill."""
    return int(memory_for(run, device) * (1 if run.training.plan_memory_gib else SHARE))


def fitted(run: Run, device: str, degrees: Degrees) -> Run:
    """A `resolved` run with what it recomputes, where `auto` is to choose it; others as they are.

    Where nothing fits, that is what takes the least memory.
    """
    if not run.chooses_layers:
        return run
    planned = planner(run, device, degrees)
    order = _order(config_of(run.model.model_name_or_path), run)

    def peak(chosen: Sequence[str]) -> int:
        return planned(_with(run, chosen)).peak

    enough = max(limit_of(run, device), peak(order))
    num = bisect_left(range(len(order)), True, key=lambda n: peak(order[:n]) <= enough)
    chosen = order[:num]
    for part in reversed(order[:num]):
        fewer = [other for other in chosen if other != part]
        if peak(fewer) <= enough:
            chosen = fewer
    return _with(run, chosen)


def tell(run: Run, device: str, degrees: Degrees) -> None:
    """Log what `auto` has chosen for a `fitted` run, whether a run is planned to fit, and that rows
    are longer than what the model was made for.
    """
    longest = config_of(run.model.model_name_or_path).max_position_embeddings
    if run.data.max_seq_len > longest:
        log.warning(
            "max_seq_len=%d is more than the %d positions of the model (max_position_embeddings): "
            "texts longer than that are beyond what it was made for",
            run.data.max_seq_len,
            longest,
        )
    found, limit = plan(run, device, degrees).peak / GIB, limit_of(run, device) / GIB
    if not run.chooses_layers:
        if found > (there := memory_for(run, device) / GIB):
            log.warning(
                "%.2f GiB are planned, and a rank has %.2f; `erniekit plan` says what takes less",
                found, there,
            )  # fmt: skip
        return
    words = ", ".join(run.chosen_layers) or "nothing"
    log.info("computed again: %s (%.2f GiB planned, of %.2f)", words, found, limit)
    if found > limit:
        more = " of the layers outside no_recompute_layers" if run.model.no_recompute_layers else ""
        log.warning(
            "nothing more%s can be computed again; `erniekit plan` says what takes less", more
        )


def _order(config: ErnieConfig, run: Run) -> list[str]:
    """The parts that can be computed again, as words, by bytes freed per operation."""
    kept = _with(run, [])
    freed_per_flop: dict[str, float] = {}
    for layer, part in itertools.product(range(config.num_hidden_layers), ("full_attn", "mlp")):
        again = _with(run, [word := f"{part}:{layer}"])
        if flops := again_flops(config, again, layer):  # not a layer that shall keep its own
            freed = kept_words(config, kept, layer) - kept_words(config, again, layer)
            freed_per_flop[word] = freed / flops
    again = _with(run, [word := f"full:{TOWER}"])
    if run.stage.reads_pictures and (flops := tower_again_flops(config, again)):
        freed_per_flop[word] = (picture_words(config, kept) - picture_words(config, again)) / flops
    # Sorting keeps lower layers first among equals.
    return sorted(freed_per_flop, key=lambda word: -freed_per_flop[word])


def _with(run: Run, chosen: Sequence[str]) -> Run:
    """The run with these parts computed again, and no other."""
    words = tuple(_words(parts_again(tuple(chosen))))
    return dataclasses.replace(run, chosen_layers=words)


def _words(parts: dict[int | str, str]) -> Iterator[str]:
    """`recompute_layers` of parts: neighbours that do the same are one word."""
    layers = sorted(where for where in parts if isinstance(where, int))
    runs = itertools.groupby(enumerate(layers), lambda pair: (pair[1] - pair[0], parts[pair[1]]))
    for (_, granularity), group in runs:
        first, *rest = [layer for _, layer in group]
        yield f"{granularity}:{first}" + (f"-{rest[-1]}" if rest else "")
    if TOWER in parts:
        yield f"full:{TOWER}"
