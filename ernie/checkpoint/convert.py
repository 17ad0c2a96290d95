"""The interpreter of the layout tables, both ways: stored tensors to native ones and back.

`plan` applies a table to the parameters of a model: a list of units, each a set of native tensors
with all the stored tensors that make them up. `detect` finds the layout of a folder and checks that
plan and folder agree to the last tensor. `native_tensors` and `stored_tensors` then move data unit
by unit, so that memory holds little more than the result.

    stored qkv_proj (h, q + 2 kv) --turned--> rows  q | k | v  <-- native q_proj, k_proj, v_proj
    stored gate_proj, up_proj of expert e   --> rows gate | up <-- native gate_up_proj[e]

A `template` maps native names to tensors whose shape and dtype count: parameters on the meta
device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ernie.checkpoint.folder import CheckpointError, Stored
from ernie.checkpoint.layouts import BLOCKS, Layout, Row, layouts_of
from ernie.checkpoint.writer import Planned

Shape = tuple[int, ...]
Template = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """One row of a table at one place: stored tensors one under another equal native ones."""

    stored: tuple[str, ...]
    shape: Shape  # of each stored tensor, in the file
    native: tuple[str, ...]
    expert: int | None  # the entry of a stacked native tensor
    turned: bool
    either_way: bool

    def views(self, native: Mapping[str, Tensor]) -> list[Tensor]:
        """The parts of the native tensors that this group is about."""
        whole = [native[name] for name in self.native]
        return whole if self.expert is None else [tensor[self.expert] for tensor in whole]


@dataclass(frozen=True)
class Unit:
    """Native tensors that are made together, and the groups that make them."""

    native: tuple[str, ...]
    groups: tuple[Group, ...]


# --- from the table to a plan ---


def plan(
    template: Template, layout: Layout, root: str | None = None, tower: str | None = None
) -> list[Unit]:
    """The units of all parameters, in their order; names begin with `root` and `tower`, which are
    those that the layout writes unless given.

    Raises CheckpointError for a parameter that no row of the layout describes.
    """
    units: list[Unit] = []
    done: set[str] = set()
    prefixes = {"root": root or layout.roots[0], "tower": tower or layout.towers[0]}
    for name in template:
        if name in done:
            continue
        row, place = _row_of(name, layout)
        native = tuple(p.removesuffix("[{e}]").format(**place) for p in row.native)
        experts = range(len(template[name])) if row.native[0].endswith("[{e}]") else (None,)
        before = template.get(name.replace(".vision_experts.", ".experts."), ())  # for `{v}`
        places = (
            {**place, **prefixes, "e": e, "v": e if e is None else len(before) + e} for e in experts
        )
        units.append(Unit(native, tuple(_group(row, native, p, template) for p in places)))
        done.update(native)
    return units


def _row_of(name: str, layout: Layout) -> tuple[Row, dict[str, str]]:
    for pattern, row in _patterns(layout):
        if match := pattern.fullmatch(name):
            return row, match.groupdict()
    raise CheckpointError(
        f"parameter {name} has no place in layout {layout.name!r}; "
        "merge or remove what was added to the model"
    )


@cache
def _patterns(layout: Layout) -> list[tuple[re.Pattern, Row]]:
    """Rows with `{block}` spelled out, each behind the pattern of its first native name."""
    rows = []
    for row in layout.rows:
        for stored, native in BLOCKS if "{block}" in row.native[0] else [("", "")]:
            spelled = replace(
                row,
                stored=tuple(s.replace("{block}", stored) for s in row.stored),
                native=tuple(n.replace("{block}", native) for n in row.native),
            )
            text = re.escape(spelled.native[0].removesuffix("[{e}]"))
            text = text.replace(r"\{i\}", r"(?P<i>\d+)")
            text = text.replace(r"\{leaf\}", "(?P<leaf>weight|bias)")
            rows.append((re.compile(text), spelled))
    return rows


def _group(
    row: Row, native: tuple[str, ...], place: Mapping[str, object], template: Template
) -> Group:
    expert = place["e"]
    assert expert is None or isinstance(expert, int)
    shapes = [tuple(template[n].shape)[0 if expert is None else 1 :] for n in native]
    turned = row.transposed and len(shapes[0]) == 2
    shape = (sum(s[0] for s in shapes) // len(row.stored), *shapes[0][1:])
    return Group(
        stored=tuple(pattern.format(**place) for pattern in row.stored),
        shape=shape[::-1] if turned else shape,
        native=native,
        expert=expert,
        turned=turned,
        either_way=row.either_way,
    )


def names_of(units: Sequence[Unit]) -> list[str]:
    """Every stored name, in order."""
    return [name for unit in units for group in unit.groups for name in group.stored]


# --- a plan against a folder ---


def detect(
    source: str | Path,
    tensors: Mapping[str, Stored],
    template: Template,
    layouts: Iterable[Layout] | None = None,
) -> tuple[Layout, list[Unit]]:
    """The layout whose names fit a folder best, and its plan, which fits the folder exactly.

    `source` is the folder, or a name for where else the tensors are from. `layouts` are those of
    the template's kind of model unless given. Raises CheckpointError for the first missing or
    unknown tensor or wrong shape.
    """
    candidates = [
        (layout, plan(template, layout, root, tower))
        for layout in (layouts_of(template).values() if layouts is None else layouts)
        for root in layout.roots
        for tower in layout.towers
    ]
    misfits = [len(tensors.keys() ^ set(names_of(units))) for _, units in candidates]
    layout, units = candidates[misfits.index(min(misfits))]
    wanted = names_of(units)
    if unknown := sorted(tensors.keys() - set(wanted)):
        raise CheckpointError(
            f"{tensors[unknown[0]].file} holds {unknown[0]}{_and_more(unknown)}, for which a model "
            f"of this config.json has no place in layout {layout.name!r}"
        )
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(
            f"{source} holds no {missing[0]}{_and_more(missing)}, which config.json asks for in "
            f"layout {layout.name!r}"
        )
    groups_fitted = (
        replace(unit, groups=tuple(_fitted(group, tensors, template) for group in unit.groups))
        for unit in units
    )
    return layout, list(groups_fitted)


def _fitted(group: Group, tensors: Mapping[str, Stored], template: Template) -> Group:
    wanted = template[group.native[0]].dtype
    for name in group.stored:
        stored = tensors[name]
        if stored.dtype != wanted and not (
            stored.dtype.is_floating_point and wanted.is_floating_point
        ):
            raise CheckpointError(
                f"tensor {name} in {stored.file} is {str(stored.dtype).removeprefix('torch.')}, "
                f"which is not a weight here; it must be {str(wanted).removeprefix('torch.')}"
            )
        if stored.shape == group.shape:
            continue
        if group.either_way and stored.shape == group.shape[::-1]:
            return replace(group, shape=group.shape[::-1], turned=not group.turned)
        raise CheckpointError(
            f"tensor {name} in {stored.file} is {_by(stored.shape)}, but config.json asks for "
            f"{_by(group.shape)}{_hint(name)}"
        )
    return group


def _hint(name: str) -> str:
    is_vocabulary = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
    return " (vocab_size x hidden_size)" if is_vocabulary else ""


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# --- moving data ---


def native_tensors(
    units: Sequence[Unit],
    tensors: Mapping[str, Stored],
    template: Template,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor) for every parameter, in the template's dtypes; one unit in memory.

    Raises CheckpointError for a value that is not finite in the wanted dtype.
    """
    for unit in units:
        native = {
            name: torch.empty(template[name].shape, dtype=template[name].dtype, device=device)
            for name in unit.native
        }
        for group in unit.groups:
            _read_group(group, tensors, group.views(native))
        yield from native.items()


def _read_group(group: Group, tensors: Mapping[str, Stored], views: Sequence[Tensor]) -> None:
    size = group.shape[1] if group.turned else group.shape[0]
    for number, name in enumerate(group.stored):
        parts = list(_overlaps(views, number * size, (number + 1) * size))
        for first, chunk in tensors[name].rows():
            chunk = _finite(chunk.to(views[0].dtype), tensors[name])
            for start, view in parts:
                if group.turned:
                    columns = slice(first, first + len(chunk))
                    view[:, columns].copy_(chunk[:, start : start + len(view)].T)
                else:
                    low, high = max(first, start), min(first + len(chunk), start + len(view))
                    if low < high:
                        view[low - start : high - start].copy_(chunk[low - first : high - first])


def _overlaps(views: Sequence[Tensor], low: int, high: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of the views, stood one under another, within rows [low, high): (first row, part)."""
    top = 0
    for view in views:
        start, stop = max(low, top), min(high, top + len(view))
        if start < stop:
            yield start - low, view[start - top : stop - top]
        top += len(view)


def _finite(chunk: Tensor, stored: Stored) -> Tensor:
    # One pass: NaN and infinities both show in the extremes.
    if not all(extreme.isfinite() for extreme in chunk.aminmax()):
        raise CheckpointError(
            f"tensor {stored.name} in {stored.file} holds NaN, Inf or a number beyond "
            f"{chunk.dtype}; the weights are damaged or the run that wrote them diverged"
        )
    return chunk


def planned(units: Sequence[Unit], template: Template) -> list[Planned]:
    """What `stored_tensors` will give, in its order."""
    return [
        Planned(name, template[group.native[0]].dtype, group.shape)
        for unit in units
        for group in unit.groups
        for name in group.stored
    ]


def stored_tensors(
    units: Sequence[Unit], native: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor); `native` gives the tensor of a native name, once for each."""
    for unit in units:
        found = {name: native(name).detach() for name in unit.native}
        for group in unit.groups:
            views = group.views(found)
            joined = views[0] if len(views) == 1 else torch.cat(views)
            for name, part in zip(group.stored, joined.chunk(len(group.stored))):
                yield name, part.T if group.turned else part
