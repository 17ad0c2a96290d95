"""The verbs that turn one kind of model file into another: import-gguf, export-gguf and upcycle."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, fill, option, read_overrides

log = logging.getLogger("erniekit")


@dataclass(frozen=True, kw_only=True)
class ImportGguf:
    """How an imported model is written."""

    layout: str = option("pt", "Layout of the files.", choices=("pt", "paddle"))
    dtype: str = option("bfloat16", "Type of the weights.", choices=("bfloat16", "float32"))


@dataclass(frozen=True, kw_only=True)
class ExportGguf:
    """How an exported model is written."""

    dtype: str = option(
        "f16", "Type of the weights.", choices=("f32", "f16", "bf16", "q8_0", "q4_0")
    )


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """The mixture of experts to make."""

    num_experts: int = option(8, "Routed experts of a layer.")
    top_k: int = option(2, "Experts of a token.")
    num_shared_experts: int = option(2, "Shared experts of a layer.")
    first_moe_layer: int = option(1, "First layer with experts.")
    seed: int = option(0, "Seed of the routers.")
    layout: str = option("pt", "Layout of the files.", choices=("pt", "paddle"))


def run_import_gguf(words: Sequence[str]) -> int:
    from ernie.checkpoint.gguf import import_gguf

    source, target, options = _read(words, ImportGguf)
    import_gguf(source, target, **dataclasses.asdict(options))
    log.info("imported %s into %s", source, target)
    return 0


def run_export_gguf(words: Sequence[str]) -> int:
    from ernie.checkpoint.gguf_export import export_gguf

    source, target, options = _read(words, ExportGguf)
    export_gguf(str(source), target, **dataclasses.asdict(options))
    log.info("exported %s as %s", source, target)
    return 0


def run_upcycle(words: Sequence[str]) -> int:
    from ernie.checkpoint.upcycle import upcycle

    source, target, options = _read(words, Upcycle)
    upcycle(source, target, **dataclasses.asdict(options))
    log.info("%s became a mixture of experts in %s", source, target)
    return 0


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The form of the weights that are written."""

    quantization: str = option("wint8", "Scheme: wint8, wint4, wint4_all, or a JSON object.")


def run_quantize(words: Sequence[str]) -> int:
    from ernie.checkpoint.quantized import write_quantized

    source, target, options = _read(words, Quantize)
    write_quantized(source, target, **dataclasses.asdict(options))
    log.info("quantised %s into %s", source, target)
    return 0


def _read(words: Sequence[str], kind: type) -> tuple[Path, Path, Any]:
    """Two paths and `key=value` words."""
    paths = [word for word in words if "=" not in word]
    if len(paths) != 2:
        raise ConfigError(f"{len(paths)} paths were given; give what to read and where to write")
    (options,) = fill([kind], read_overrides([w for w in words if "=" in w]), "the command line")
    return Path(paths[0]), Path(paths[1]), options
