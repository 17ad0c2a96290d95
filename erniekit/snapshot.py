"""What a checkpoint holds: one flat dict of whole tensors; and the files these become, both ways.

    weights/<parameter>              all of them (Full), or the pairs of an adapter (LoRA)
    optimizer/<parameter>.<part>     moments, and float32 originals
    ema/<parameter>                  averages of the trained weights, where the run keeps them
    batches/<number>.<array>         what is left of a round of rollouts (stage: UPO)

The weights are a folder that loads by itself, and so is `ema/` in it: averages, with all that is
not trained beside them. The head of a reward model lies in a file of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from ernie.chat import write_lock
from ernie.checkpoint import io
from ernie.checkpoint.writer import write_file
from ernie.model import KEPT_FLOAT32, ErnieModel
from erniekit import checkpoint, lora_files, optim, reward_model
from erniekit.average import Average
from erniekit.build import lora_of
from erniekit.config import Run
from erniekit.data.dialogue import Encoder
from erniekit.optim import AdamW

if TYPE_CHECKING:
    from erniekit.parallel.forms import Form

log = logging.getLogger("erniekit")

WEIGHTS, OPTIMIZER, AVERAGE, BATCHES = "weights/", "optimizer/", "ema/", "batches/"


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, without its prefix."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def taken(
    form: Form, weights: Mapping[str, Tensor], optimizer: AdamW, batches: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that a checkpoint holds besides its state, whole, on rank 0. All ranks must call
    it.

    These may be the tensors themselves, which the next step changes.
    """
    whole, state = form.whole(weights), form.whole_state(optimizer)
    mark = f".{optim.AVERAGE}"
    averages = {k.removesuffix(mark): state.pop(k) for k in list(state) if k.endswith(mark)}
    parts = ((WEIGHTS, whole), (OPTIMIZER, state), (AVERAGE, averages), (BATCHES, batches))
    return {prefix + name: t.detach() for prefix, part in parts for name, t in part.items()}


def write(
    run: Run, model: ErnieModel, encoder: Encoder, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """The files of a checkpoint; `model` and `encoder` give what is not among the tensors."""
    weights, averages = part(tensors, WEIGHTS), part(tensors, AVERAGE)
    write_model(run, model, encoder, weights, folder)
    (folder / checkpoint.OPTIMIZER_FILE).parent.mkdir()
    write_file(folder / checkpoint.OPTIMIZER_FILE, part(tensors, OPTIMIZER))
    if batches := part(tensors, BATCHES):
        write_file(folder / checkpoint.BATCHES_FILE, batches)
    if averages:
        write_model(run, model, encoder, weights | averages, folder / checkpoint.AVERAGE_FOLDER)


def write_model(
    run: Run,
    model: ErnieModel,
    encoder: Encoder,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    rounded: bool = False,
) -> None:
    """Weights by parameter as a folder that loads: a model, or an adapter (float32).

    `rounded` writes a model as it is published and served: bfloat16, routers and their bias
    float32. A tensor is converted when its turn comes. Beside it lies how it was spoken to, if it
    was.
    """
    weights, head_1D = reward_model.split(weights)
    if run.is_lora:
        _write_adapter(run, model, weights, folder)
    else:
        _write_whole(model, weights, folder, rounded=rounded)
    if head_1D is not None:
        reward_model.write_head(folder, head_1D)
    if run.stage.sample != "document":
        write_lock(folder, encoder.template, encoder.tokenizer)


def _write_whole(
    model: ErnieModel, weights: Mapping[str, Tensor], folder: Path, *, rounded: bool
) -> None:
    dtypes = {
        name: torch.bfloat16 if rounded and not name.endswith(KEPT_FLOAT32) else tensor.dtype
        for name, tensor in weights.items()
    }
    template = {
        name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta")
        for name, tensor in weights.items()
    }
    io.write(
        folder,
        model.config,
        template,
        weights.__getitem__,
        layout=model.layout,
        tokenizer=model.tokenizer,
        generation_config=model.generation_config,
    )


def _write_adapter(
    run: Run, model: ErnieModel, weights: Mapping[str, Tensor], folder: Path
) -> None:
    folder.mkdir(exist_ok=True)
    files = {lora_files.file_name(name): tensor for name, tensor in weights.items()}
    write_file(folder / lora_files.ADAPTER_FILE, files)
    config = lora_files.adapter_config(model, lora_of(run), run.model.model_name_or_path)
    checkpoint.replace_text(folder / lora_files.ADAPTER_CONFIG, config)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def read_weights(run: Run, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder made by `write_model`, by parameter, float32, one after the other."""
    if run.stage.has_reward_head:
        yield reward_model.HEAD, reward_model.read_head(folder)
    if not run.is_lora:
        yield from io.open_weights(folder, torch.float32)[1]
        return
    for name, tensor in load_file(folder / lora_files.ADAPTER_FILE).items():
        yield lora_files.parameter_name(name), tensor


def parts_of(
    run: Run, form: Form, parameters: Mapping[str, Tensor], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """What this rank has of the weights of a folder, by parameter."""
    for name, tensor in read_weights(run, folder):
        yield name, form.part_of(parameters[name], tensor)


def fill_average(
    average: Average, run: Run, form: Form, parameters: Mapping[str, Tensor], folder: Path
) -> None:
    """Take over the averages of a checkpoint; where it has none this is told."""
    source = folder / checkpoint.AVERAGE_FOLDER
    if source.is_dir():
        average.load(parts_of(run, form, parameters, source), str(source))
    else:
        log.warning("%s has no averaged weights: the average begins with its weights", folder)
