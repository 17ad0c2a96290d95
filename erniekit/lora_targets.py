"""Which weights get an adapter: PEFT's `target_modules`, checked against the model.

A target is `all-linear`, the end of a module's name (`q_proj`, `shared_experts.up_proj`,
`experts`), or a regular expression of whole names. A stack of routed experts is one weight, with
one pair for each expert, and goes by several names:

    model.layers.1.mlp.experts                                    both of its weights
    model.layers.1.mlp.experts.gate_up_proj, ...experts.down_proj
    model.layers.1.mlp.experts.0.gate_proj and ...0.up_proj       together, as published: one weight
    model.layers.1.mlp.experts.0.down_proj

so that `gate_proj, up_proj, down_proj` mean dense blocks, shared experts and routed experts alike.
A target that matches nothing is refused, and so is one half of gate and up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ernie.settings import ConfigError

ALL = "all-linear"


def chosen(names: Collection[str], targets: Sequence[str]) -> set[str]:
    """Those of `names` that the targets mean; no target means all.

    Raises ConfigError.
    """
    if not targets:
        return set(names)
    found: set[str] = set()
    halves: dict[str, set[str]] = {}
    for target in targets:
        hits = set()
        for name in names:
            wholes, parts = _spellings(name)
            met = {part for part in parts if _matches(part, target)}
            if any(_matches(whole, target) for whole in wholes):
                hits.add(name)
            elif met:
                halves.setdefault(name, set()).update(met)
                if len(halves[name]) == len(parts):
                    hits.add(name)
        if not hits and not any(
            _matches(part, target) for parts in halves.values() for part in parts
        ):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"lora_target_modules={target} matches no projection of this model; use {ALL}, "
                f"{', '.join(ends)}, experts, or a regular expression of whole names"
            )
        found |= hits
    if torn := sorted(halves.keys() - found):
        (half,) = {part.rpartition(".")[2] for part in halves[torn[0]]}
        other = "up_proj" if half == "gate_proj" else "gate_proj"
        raise ConfigError(
            f"lora_target_modules means {half} of {torn[0]} without its {other}, but the two are "
            f"one weight of routed experts; name both, or leave experts out, as in "
            f"shared_experts.{half}"
        )
    return found


def shortest(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Ends of names that mean `wanted` among `names`, or their whole names where no ends do."""
    ends = {name.rpartition(".")[2] for name in wanted}
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(wanted) else wanted)


def _spellings(name: str) -> tuple[list[str], list[str]]:
    """Names of which each means a weight, and names that mean it together."""
    home, _, leaf = name.rpartition(".")
    if not home.endswith((".experts", ".vision_experts")):
        return [name], []
    if leaf == "gate_up_proj":
        return [name, home], [f"{home}.0.gate_proj", f"{home}.0.up_proj"]
    return [name, home, f"{home}.0.{leaf}"], []


def _matches(name: str, target: str) -> bool:
    if target.lower() == ALL:
        return True
    if re.fullmatch(r"[\w.\-]+", target):
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ConfigError(
            f"lora_target_modules={target} is not a regular expression ({error}); use names, or "
            f"{ALL}"
        ) from None
