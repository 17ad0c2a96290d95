"""The verbs that turn one kind of model file into another: import-gguf, export-gguf, quantize and
upcycle; and how they, and `merge`, treat what already lies where they write.

A folder takes the place of its target when it is whole, and `made_by.json` in it says which verb
wrote it. Refused: a target that is read, and without `overwrite` one that holds a model or
checkpoints, unless the same verb wrote it and nothing changed it since. A reward head goes where
its model goes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError, fill, option, read_overrides
from erniekit import checkpoint

log = logging.getLogger("erniekit")

MADE_BY = "made_by.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is done where something lies already."""

    overwrite: bool = option(False, "Replace the model that the target holds.")


def check_target(verb: str, target: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Raise ConfigError for a target that is read, or that `verb` must not replace."""
    for source in sources:
        if target.resolve() == source.resolve():
            raise ConfigError(f"{target} is read and cannot be the target too; give another one")
    if not overwrite and (what := _held(verb, target)):
        raise ConfigError(
            f"the target {target} {what}; give another one, or overwrite=true to replace it"
        )


def _held(verb: str, target: Path) -> str:
    """What would be lost; the empty string for nothing."""
    if target.is_file():
        return "is a file that exists"
    if checkpoint.checkpoints(target):
        return "holds checkpoints of a run"
    has_model = any(target.glob("*.safetensors")) or checkpoint.has_model(target)
    return "holds a model" if has_model and not _is_of(verb, target) else ""


def _is_of(verb: str, folder: Path) -> bool:
    """Whether a folder holds what `verb` wrote, and nothing was written to it since."""
    try:
        told = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(told == _made_by(verb, folder))


def _made_by(verb: str, folder: Path) -> dict[str, object]:
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    return {"verb": verb, "written_ns": times}


@contextmanager
def written(verb: str, target: Path, sources: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end; see `check_target`."""
    if target.is_file():
        raise ConfigError(f"{target} is a file; give a folder")
    check_target(verb, target, sources, overwrite=overwrite)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target if target.is_dir() else target.parent  # of one file system
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home) as hidden:
        made = Path(hidden) / target.name
        yield made
        (made / MADE_BY).write_text(json.dumps(_made_by(verb, made), indent=2) + "\n")
        checkpoint.remove_model(target)
        files = (path.relative_to(made) for path in made.rglob("*") if path.is_file())
        for name in sorted(files, key=lambda name: name.name == "config.json"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / name, target / name)


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

    given, target, options, place = _read(words, ImportGguf)
    source = Path(given)
    with written("import-gguf", target, [source], overwrite=place.overwrite) as folder:
        import_gguf(source, folder, **dataclasses.asdict(options))
    log.info("imported %s into %s", source, target)
    return 0


def run_export_gguf(words: Sequence[str]) -> int:
    from ernie.checkpoint.gguf_export import export_gguf
    from erniekit.reward_model import refuse_head

    source, target, options, place = _read(words, ExportGguf)
    if not target.is_dir():
        check_target("export-gguf", target, [Path(source)], overwrite=place.overwrite)
    refuse_head(resolve(source), "gguf")
    export_gguf(source, target, **dataclasses.asdict(options))
    log.info("exported %s as %s", source, target)
    return 0


def run_upcycle(words: Sequence[str]) -> int:
    from ernie.checkpoint.upcycle import upcycle
    from erniekit.reward_model import copy_head

    given, target, options, place = _read(words, Upcycle)
    source = resolve(given)
    with written("upcycle", target, [source], overwrite=place.overwrite) as folder:
        copy_head(source, folder)
        upcycle(source, folder, **dataclasses.asdict(options))
    log.info("%s became a mixture of experts in %s", source, target)
    return 0


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The form of the weights that are written."""

    quantization: str = option("wint8", "Scheme: wint8, wint4, wint4_all, or a JSON object.")


def run_quantize(words: Sequence[str]) -> int:
    from ernie.checkpoint.quantized import write_quantized
    from erniekit.reward_model import copy_head

    given, target, options, place = _read(words, Quantize)
    source = resolve(given)
    with written("quantize", target, [source], overwrite=place.overwrite) as folder:
        copy_head(source, folder)
        write_quantized(source, folder, **dataclasses.asdict(options))
    log.info("quantised %s into %s", source, target)
    return 0


def _read(words: Sequence[str], kind: type) -> tuple[str, Path, Any, Target]:
    """What to read, where to write, and `key=value` words."""
    paths = [word for word in words if "=" not in word]
    if len(paths) != 2:
        raise ConfigError(f"{len(paths)} paths were given; give what to read and where to write")
    given = read_overrides([word for word in words if "=" in word])
    options, place = fill([kind, Target], given, "the command line")
    return paths[0], Path(paths[1]), options, place
