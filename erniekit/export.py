"""`erniekit export`: an adapter merged into its base, a model that anything can load and serve."""

from __future__ import annotations

import logging
import shutil

from safetensors.torch import load_file

import ernie
from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError
from erniekit import checkpoint, lora
from erniekit.config import Run
from erniekit.recipes.evaluation import trained_folder

log = logging.getLogger("erniekit")

# Beside weights and tokenizer; absent ones are not made up.
_KEPT_FILES = ("generation_config.json", "chat_template.jinja")


def export(run: Run) -> int:
    """Write `output_dir/export` in the layout and dtype of the base; returns the exit code.

    The sum of base and adapter is made in float32 and rounded once.
    """
    folder = trained_folder(run.output)
    if folder is None:
        raise ConfigError(f"{run.output} holds no checkpoint; train first, or give its output_dir")
    if not (folder / lora.ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{folder} holds no adapter but a whole model, which needs no export; serve it as it is"
        )
    base = resolve(run.model.model_name_or_path)
    target = run.output / "export"
    with checkpoint.locked(run.output):
        model = ernie.load(base, dtype=None)
        pair = lora.read_adapter_config(folder)
        lora.add_lora(model, pair, seed=0)
        path = folder / lora.ADAPTER_FILE
        lora.load_adapter(model, load_file(path), str(path))
        lora.merge_lora(model)
        if not run.export.copy_tokenizer:
            model.tokenizer = None
        size = int(run.export.max_shard_size * 1e9)
        ernie.save(model, target, layout=model.layout, max_shard_bytes=size)
        for name in _KEPT_FILES:
            if (base / name).is_file() and not (target / name).exists():
                shutil.copyfile(base / name, target / name)
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    log.info("merged %s into %s (%s, layout %s)", folder, target, dtype, model.layout)
    return 0
