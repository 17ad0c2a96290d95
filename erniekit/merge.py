"""`erniekit merge`: several models of one shape mixed into a new one.

A tensor here is a matrix or vector of the published `-PT` files: each expert and each projection is
mixed by itself, in float32, and rounded once. Files are read as the mix is written, so memory holds
one layer's experts of each model and no whole model. x_i is a tensor of source i, w_i its weight, b
that of the base, d_i = x_i - b.

    linear      sum w_i x_i / sum w_i
    slerp       from x_1 (t = 0) to x_2 (t = 1) along the arc between their directions
    ties        b + scale * sum over kept d_i of w_i d_i / their w_i; small d_i are cut off first
                (density is the share that stays), and entries against the majority's sign are left
    dare        b + scale * sum w_i d_i, where an entry of d_i is kept with probability density and
                divided by it
    dare_ties   dare, without entries against the majority's sign

Source: Wortsman et al., "Model soups", 2022; Shoemake, "Animating rotation with quaternion curves",
1985; Yadav et al., "TIES-Merging", 2023; Yu et al., "Language models are super Mario", 2023; with
the conventions of mergekit (Goddard et al., 2024) for weights and normalisation.

Reward models are merged with their heads. Refused: networks that differ in anything but names,
other tokenizers, heads in some sources only, quantised folders, settings that the method does not
read, and what `erniekit.convert` refuses of targets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie.chat.lock import tokenizer_hash
from ernie.checkpoint.hub import resolve
from ernie.checkpoint.io import open_weights, write
from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.settings import ConfigError, check_bounds, fill, option, read_overrides
from erniekit import reward_model
from erniekit.convert import Target, written
from erniekit.export import copy_kept_files

log = logging.getLogger("erniekit")

# The settings that a method reads, besides layout and dtype.
METHODS = {
    "linear": ("weights", "normalize"),
    "slerp": ("t",),
    "ties": ("weights", "normalize", "base", "density", "scale"),
    "dare": ("weights", "normalize", "base", "density", "scale", "seed"),
    "dare_ties": ("weights", "normalize", "base", "density", "scale", "seed"),
}
_PARALLEL = 0.9995  # cosine above which the arc is a line, to rounding


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How models are mixed."""

    method: str = option("linear", "How tensors are mixed.", choices=tuple(METHODS))
    weights: tuple[float, ...] = option((), "Weight of each source; none: equal ones.")
    normalize: bool | None = option(
        None, "Divide by the sum of the weights; none: for linear and ties."
    )
    base: str | None = option(None, "Model that the sources were trained from.")
    density: float = option(0.5, "Share of the differences that is kept.", above=0, most=1)
    scale: float = option(1.0, "Factor of the mixed difference to the base.")
    t: float = option(
        0.5, "Place on the arc: 0 is the first source, 1 the second.", least=0, most=1
    )
    seed: int = option(0, "Seed of what is dropped.", least=0)
    layout: str = option("pt", "Layout of the files.", choices=("pt", "paddle", "transformers"))
    dtype: str | None = option(
        None, "Type of the weights; none: as in the first source.",
        choices=(None, "bfloat16", "float16", "float32"),
    )  # fmt: skip


def run_merge(words: Sequence[str]) -> int:
    """The verb: paths of sources and of the new folder, then `key=value` words."""
    paths = [word for word in words if "=" not in word]
    if len(paths) < 3:
        raise ConfigError(f"{len(paths)} paths were given; give two sources or more, and a target")
    given = read_overrides([word for word in words if "=" in word])
    options, place = fill([Merge, Target], given, "the command line")
    for key in given.keys() - {"method", "layout", "dtype", "overwrite", *METHODS[options.method]}:
        readers = ", ".join(name for name, keys in METHODS.items() if key in keys)
        raise ConfigError(f"method={options.method} does not read {key}; {readers} does")
    merge([*paths[:-1]], paths[-1], options, overwrite=place.overwrite)
    log.info("merged %d models (%s) into %s", len(paths) - 1, options.method, paths[-1])
    return 0


def merge(
    sources: Sequence[str | Path], target: str | Path, options: Merge, *, overwrite: bool = False
) -> None:
    """Write the mix of `sources` (folders or hub names) as the model folder `target`.

    Tokenizer, configuration and small files are those of the base, else of the first source.
    Raises ConfigError and CheckpointError, each before anything is written, unless a value is bad.
    """
    options = _checked(options, len(sources))
    folders = [resolve(source) for source in [*sources, *filter(None, [options.base])]]
    with written("merge", Path(target), folders, overwrite=overwrite) as folder:
        _merge(folders, folder, options)


def _merge(folders: Sequence[Path], target: Path, options: Merge) -> None:
    """The mix of models of which the last is the base, where the method has one."""
    opened = [open_weights(folder) for folder in folders]
    for folder, (model, _) in zip(folders[1:], opened[1:]):
        _check_same(opened[0][0], model, folders[0], folder)
    heads = _heads(folders)
    first, leading = opened[0][0], opened[-1 if options.base else 0][0]
    stored = first.model.embed_tokens.weight.dtype
    dtype = getattr(torch, options.dtype) if options.dtype else stored
    template = dict(ErnieModel(leading.config, dtype=dtype, device="meta").named_parameters())
    mixed = _mixed([weights for _, weights in opened], template, options)
    write(
        target,
        leading.config,
        template,
        lambda name: _next(mixed, name),
        layout=options.layout,
        tokenizer=leading.tokenizer,
        generation_config=leading.generation_config,
    )
    copy_kept_files(folders[-1 if options.base else 0], target)
    if heads:
        reward_model.write_head(target, mix_of(heads, options, reward_model.HEAD))


def _heads(folders: Sequence[Path]) -> list[Tensor]:
    """The reward heads of all models, or none."""
    without = [folder for folder in folders if not reward_model.has_head(folder)]
    if without and len(without) < len(folders):
        other = next(folder for folder in folders if folder not in without)
        raise ConfigError(
            f"{other} is a reward model and {without[0]} is none; merge reward models with each "
            "other, and without base= where it has no head"
        )
    heads = [] if without else [reward_model.read_head(folder) for folder in folders]
    for folder, head_1D in zip(folders, heads):
        if head_1D.shape != heads[0].shape:
            raise ConfigError(
                f"the reward head in {folder} is {tuple(head_1D.shape)}, that in {folders[0]} "
                f"{tuple(heads[0].shape)}; one of them belongs to another model"
            )
    return heads


def _checked(options: Merge, count: int) -> Merge:
    """With the weights spelled out. Raises ConfigError for what cannot be mixed."""
    check_bounds(options)
    weights = options.weights or (1 / count,) * count
    needs_base = "base" in METHODS[options.method]
    for wrong, message in (
        (len(weights) != count, f"weights has {len(weights)} numbers for {count} sources"),
        (needs_base and not options.base, f"method={options.method} needs base=FOLDER"),
        (options.method == "slerp" and count != 2, f"slerp mixes two models; {count} were given"),
    ):
        if wrong:
            raise ConfigError(message)
    normalize = options.normalize
    if normalize is None:
        normalize = options.method in ("linear", "ties")
    if normalize and abs(sum(weights)) < 1e-8:
        raise ConfigError(f"weights={weights} sum to 0 and cannot be normalised; normalize=false")
    return dataclasses.replace(options, weights=weights, normalize=normalize)


def _check_same(one: ErnieModel, other: ErnieModel, folder: Path, other_folder: Path) -> None:
    """Everything that shapes the network must be the same, and what its token ids mean."""
    for f in dataclasses.fields(ErnieConfig):
        values = getattr(one.config, f.name), getattr(other.config, f.name)
        if f.name not in ("extra", "max_position_embeddings") and values[0] != values[1]:
            raise ConfigError(
                f"{f.name} is {values[0]} in {folder} and {values[1]} in {other_folder}; only "
                "models of one shape can be merged"
            )
    hashes = {tokenizer_hash(m.tokenizer) for m in (one, other) if m.tokenizer is not None}
    if len(hashes) > 1:
        raise ConfigError(
            f"{folder} and {other_folder} have different tokenizers, so their rows of the "
            "vocabulary stand for different tokens; merge models that share one"
        )


def _next(mixed: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    found, tensor = next(mixed)
    assert found == name, (found, name)
    return tensor


def _mixed(
    streams: Sequence[Iterator[tuple[str, Tensor]]], template: Mapping[str, Tensor], options: Merge
) -> Iterator[tuple[str, Tensor]]:
    """(name, mix) of every tensor, in the dtypes of the template."""
    for found in zip(*streams, strict=True):
        name = found[0][0]
        assert all(other == name for other, _ in found), [other for other, _ in found]
        mix = torch.empty(template[name].shape, dtype=template[name].dtype)
        parts = zip(_parts(name, mix), *(_parts(name, tensor) for _, tensor in found), strict=True)
        for number, (out, *tensors) in enumerate(parts):
            out.copy_(mix_of(tensors, options, f"{name}/{number}"))
        yield name, mix


def _parts(name: str, tensor: Tensor) -> list[Tensor]:
    """The tensors of the published files that a native tensor is made of, as views."""
    if tensor.ndim < 3:
        return [tensor]
    halves = 2 if name.endswith("gate_up_proj") else 1
    return [part for expert in tensor for part in expert.chunk(halves)]


# --- the methods; tensors of one shape, results in float32 ---


def mix_of(tensors: Sequence[Tensor], options: Merge, name: str) -> Tensor:
    """The mix of one tensor of every source, and of the base last where the method has one.

    `options` is checked: as many weights as sources. `name` makes random drops the tensor's own.
    """
    if options.method == "linear":
        total = torch.zeros(tensors[0].shape)
        for weight, x in zip(options.weights, tensors):
            total.add_(x, alpha=weight)
        return total.div_(sum(options.weights)) if options.normalize else total
    tensors = [x.float() for x in tensors]
    if options.method == "slerp":
        return slerp(tensors[0], tensors[1], options.t)
    *sources, base = tensors
    deltas = torch.stack([x - base for x in sources])
    for i, delta in enumerate(deltas):
        if options.method == "ties":
            trim(delta, options.density)
        else:
            drop(delta, options.density, _generator(options.seed, f"{name}/{i}"))
    weights = torch.tensor(options.weights).view(-1, *[1] * base.ndim)
    weighted = deltas.mul_(weights)
    kept = _with_the_majority(weighted) if options.method != "dare" else torch.ones_like(weighted)
    mixed = (weighted * kept).sum(0)
    if options.normalize:
        shares = (weights * kept).sum(0)
        mixed /= torch.where(shares.abs() < 1e-8, 1.0, shares)
    return base + options.scale * mixed


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    """Spherical interpolation of whole tensors; a line where they are parallel or zero."""
    norms = float(one.norm()), float(other.norm())
    cosine = float((one / norms[0] * (other / norms[1])).sum()) if all(norms) else 1.0
    if abs(cosine) > _PARALLEL:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def trim(delta: Tensor, density: float) -> None:
    """Keep the share `density` of largest magnitudes (at least one, and its equals), in place."""
    kept = max(1, int(density * delta.numel()))
    if kept < delta.numel():
        sizes = delta.abs().flatten().numpy()
        sizes.partition(sizes.size - kept)
        delta[delta.abs() < float(sizes[sizes.size - kept])] = 0


def drop(delta: Tensor, density: float, generator: torch.Generator) -> None:
    """Keep each entry with probability `density`, divided by it, in place."""
    delta.mul_((torch.rand(delta.shape, generator=generator) < density) / density)


def _with_the_majority(weighted: Tensor) -> Tensor:
    """Which entries `(S, ...)` have the sign of the sum over the sources; that of 0 is plus."""
    return torch.where(weighted.sum(0) >= 0, weighted > 0, weighted < 0)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
