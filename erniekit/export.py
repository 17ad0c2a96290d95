"""`erniekit export` and `erniekit split`: what training left, as files that others load.

    pt, paddle, transformers   a model folder in that layout; an adapter is merged into its base
    gguf                       the same model as one file, for llama.cpp
    peft                       the adapter by itself, for the PEFT library

The sum of base and adapter is made in float32 and rounded once; what was written is compared with
what the adapter computes (`erniekit.merge_check`). Refused: a whole model without a form to turn it
into, a merge that differs by more than rounding, and in the form `peft` what that library cannot
hold.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ernie
from ernie.adapter_files import read_settings
from ernie.chat import LOCK_FILE
from ernie.checkpoint.gguf_export import export_gguf
from ernie.checkpoint.hub import resolve
from ernie.checkpoint.writer import write_file
from ernie.settings import ConfigError
from ernie.tokenizer import FILES
from erniekit import checkpoint, lora, lora_files, merge_check, reward_model
from erniekit.config import Run

log = logging.getLogger("erniekit")

# Beside weights and tokenizer; absent ones are not made up.
KEPT_FILES = ("generation_config.json", "chat_template.jinja")


def export(run: Run) -> int:
    """Write `output_dir/export` in the form `export_format`; returns the exit code.

    Without a form, the layout and dtype of the base are kept. Raises ConfigError.
    """
    folder = _trained(run)
    is_adapter = (folder / lora_files.ADAPTER_CONFIG).is_file()
    form = run.export.export_format
    if not is_adapter and form is None:
        raise ConfigError(
            f"{folder} holds no adapter but a whole model, which needs no export; serve it as it "
            "is, or give export_format to turn it into another form"
        )
    if not is_adapter and form == "peft":
        raise ConfigError(
            f"{folder} holds a whole model, of which there is no adapter; use another export_format"
        )
    if form in ("gguf", "peft"):
        reward_model.refuse_head(folder, form)
    target = run.output / "export"
    with checkpoint.locked(run.output):
        if form == "peft":
            target = target / "peft"  # a model may lie in the folder above
            _write_peft(folder, _base(run, folder), target)
        elif form == "gguf":
            with _whole(run, folder, is_adapter=is_adapter) as source:
                target = target / f"model-{run.export.gguf_dtype}.gguf"
                export_gguf(source, target, dtype=run.export.gguf_dtype)
        else:
            _write_whole(run, folder, target, form, is_adapter=is_adapter)
    log.info("exported %s as %s", folder, target)
    return 0


def split(run: Run) -> int:
    """Write the model of `output_dir` anew, in files of max_shard_size, into `split_export`.

    Weights, dtype and layout stay. Raises ConfigError for an adapter, which is one small file.
    """
    folder = _trained(run)
    if (folder / lora_files.ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{folder} holds an adapter, which is one file; use erniekit export")
    target = run.output / "split_export"
    with checkpoint.locked(run.output):
        _write_whole(run, folder, target, None, is_adapter=False)
    log.info(
        "split %s into files of at most %g GB in %s", folder, run.export.max_shard_size, target
    )
    return 0


def _trained(run: Run) -> Path:
    folder = checkpoint.chosen(run.output, run.training.use_checkpoint)
    if folder is None:
        raise ConfigError(f"{run.output} holds no checkpoint; train first, or give its output_dir")
    return folder


def _base(run: Run, folder: Path) -> str:
    """The model that an adapter is put on: the run's, else the folder that it was trained beside.

    Raises ConfigError.
    """
    name = run.model.model_name_or_path
    trained = read_settings(folder / lora_files.ADAPTER_CONFIG).base
    if name or (trained and Path(trained).is_dir()):
        return name or trained
    told = f"trained beside {trained}, which is not here" if trained else "of an unnamed model"
    raise ConfigError(
        f"model_name_or_path is not set; the adapter in {folder} is {told}: give its base model"
    )


def _write_whole(
    run: Run, folder: Path, target: Path, layout: str | None, *, is_adapter: bool
) -> None:
    """The model of `folder` as a model folder; `layout` None: as the base (or itself) has it."""
    name = _base(run, folder) if is_adapter else str(folder)
    base = resolve(name)
    model = ernie.load(base, dtype=None)
    samples = []
    if is_adapter:
        lora_files.put_in(model, folder, name)
        samples = merge_check.samples(model)
        lora.merge_lora(model)
    if not run.export.copy_tokenizer:
        model.tokenizer = None
    _remove_small_files(base, target)
    reward_model.mark(model, has_head=reward_model.has_head(folder))
    reward_model.copy_head(folder, target)
    size = int(run.export.max_shard_size * 1e9)
    ernie.save(model, target, layout=layout or model.layout, max_shard_bytes=size)
    if is_adapter:
        merge_check.check(target, samples)
    copy_lock(folder, target)
    copy_kept_files(base, target)


def _remove_small_files(base: Path, target: Path) -> None:
    """Those of an earlier export, which the new one may not have."""
    if base.resolve() != target.resolve():
        for name in (*FILES, reward_model.HEAD_FILE):
            for path in target.glob(name):
                path.unlink()


def copy_lock(source: Path, target: Path) -> None:
    """What a model was trained with goes where the model goes."""
    if (source / LOCK_FILE).is_file():
        shutil.copyfile(source / LOCK_FILE, target / LOCK_FILE)


def copy_kept_files(source: Path, target: Path) -> None:
    """The small files of a model folder that saving a model does not write by itself."""
    for name in KEPT_FILES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


@contextmanager
def _whole(run: Run, folder: Path, *, is_adapter: bool) -> Iterator[Path]:
    """A folder with the whole model: `folder` itself, or a merged one for as long as needed."""
    if not is_adapter:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=run.output) as hidden:
        _write_whole(run, folder, Path(hidden), None, is_adapter=True)
        yield Path(hidden)


def _write_peft(folder: Path, name: str, target: Path) -> None:
    base = ernie.load(name, dtype=None)
    form, tensors = lora_files.read_adapter(folder, base.config, name)
    text, files = lora_files.peft_form(base, form, tensors, name, str(folder))
    target.mkdir(parents=True, exist_ok=True)
    (target / LOCK_FILE).unlink(missing_ok=True)  # of an earlier export
    write_file(target / lora_files.ADAPTER_FILE, files)
    copy_lock(folder, target)
    checkpoint.replace_text(target / lora_files.ADAPTER_CONFIG, text)
