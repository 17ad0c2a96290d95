"""Reward models: a number beside the vocabulary, what it is trained on, and how it is loaded.

    reward = w . norm(hidden at the last token of an answer)        w (1, D), float32

The head is a `Linear` of the name `score` put into a model (`add_reward_head`); nothing else of
the network changes. In a folder it lies beside the weights, which still load as a model without it:

    config.json                    "reward_head": "reward_head/model.safetensors"
    reward_head/model.safetensors  "score.weight" (1, D); beside an adapter too

Refused: by `load` a folder without a head, and one whose head is of another width; by every reader
a `config.json` that names a head which is not there.

Legend: T tokens of the batch, D hidden size, P pairs, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import ernie
from ernie.adapter_files import read_settings
from ernie.attention import packed_causal, shared_prompt
from ernie.checkpoint.errors import CheckpointError
from ernie.checkpoint.writer import write_file
from ernie.config import ErnieConfig
from ernie.layers import Linear
from ernie.model import Embeds, ErnieModel, Prompt
from ernie.moe.router import Routing
from ernie.settings import ConfigError
from ernie.vision.prompt import Inputs
from erniekit import lora, lora_files
from erniekit.device_batch import Pairs
from erniekit.gradients import Gradients
from erniekit.losses import Loss, Terms, hidden_of, with_terms
from erniekit.preference import NO_TERMS, told_of_pairs

Dialogue = Sequence[int] | Inputs
HEAD = "score.weight"
HEAD_FILE = "reward_head/model.safetensors"
CONFIG_KEY = "reward_head"


def add_reward_head(model: ErnieModel, *, seed: int) -> None:
    """Give a model a trained head, in place; the head to the vocabulary is no longer trained.

    w is normal with variance 1 / (D + 1). Source: learning to summarise from human feedback (arXiv
    2009.01325, appendix B.1).
    """
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    values_1D = torch.randn(1, size, generator=generator) * (size + 1) ** -0.5  # float32
    score = Linear(size, 1, bias=False)
    score.weight = nn.Parameter(values_1D.to(model.device))
    model.score = score
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)
    mark(model)


def put_head(model: ErnieModel, folder: Path, *, seed: int) -> None:
    """Give a model the head of a folder, or a new one to train where it has none, in place."""
    add_reward_head(model, seed=seed)
    if has_head(folder):
        fill_head(model, folder)


def take_head(model: ErnieModel, folder: Path) -> None:
    """Give a model the head of a folder, in place; raises ConfigError where it has none."""
    add_reward_head(model, seed=0)
    fill_head(model, folder)


def mark(model: ErnieModel, *, has_head: bool = True) -> None:
    """Have the configuration of a model say where its head lies, or that it has none."""
    extra = {k: v for k, v in model.config.extra.items() if k != CONFIG_KEY}
    extra |= {CONFIG_KEY: HEAD_FILE} if has_head else {}
    model.config = dataclasses.replace(model.config, extra=extra)


def rewards(model: ErnieModel, hidden_TD: Tensor, places: Tensor) -> Tensor:
    """Rewards of the sequences whose last tokens stand at `places` (int64), float32, its shape."""
    last_SD = model.model.norm(hidden_TD[places.flatten()]).float()
    return (last_SD @ _head(model)[0]).view(places.shape)


def _head(model: ErnieModel) -> Tensor:
    return model.get_parameter(HEAD)


# --- the loss ---


def bradley_terry(
    model: ErnieModel,
    batch: Pairs,
    *,
    scale: float,
    terms: Terms = NO_TERMS,
    share: float = 1.0,
    gradients: Gradients | None = None,
) -> Loss:
    """-log sigmoid(reward of the chosen - reward of the rejected answer) of every pair, summed and
    multiplied by `scale`, one over the number of pairs of the whole optimizer step.

    Rows must have the end of each answer among their inputs. `parts` as in `preference`; for the
    rest see `losses.next_token`. Source: Bradley and Terry (1952), as in InstructGPT (arXiv
    2203.02155, eq. 1).
    """
    del gradients  # all of them come through autograd
    routings: list[Routing | None] = []
    hidden_TD = hidden_of(model, batch, shared_prompt(batch.pairs_P4), routings)
    rewards_P2 = rewards(model, hidden_TD, batch.pairs_P4[:, 2:] - 1).double()
    value = -logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]).sum() * scale
    told = told_of_pairs(rewards_P2.detach())
    parts = {name: value_P.sum() * scale for name, value_P in told.items()}
    return with_terms(model, value, parts, routings, terms, share)


# --- files ---


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Weights by parameter without the head, and the head where there is one."""
    return {name: t for name, t in weights.items() if name != HEAD}, weights.get(HEAD)


def write_head(folder: Path, head_1D: Tensor) -> None:
    path = folder / HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, {HEAD: head_1D})


def copy_head(source: Path, target: Path) -> None:
    """The head of a folder, where it has one, beside weights that were made of its own."""
    if has_head(source):
        write_head(target, read_head(source))


def has_head(folder: Path) -> bool:
    """Whether a folder holds a head. Raises CheckpointError where its config.json names one that is
    not there.
    """
    if (folder / HEAD_FILE).is_file():
        return True
    config = folder / "config.json"
    if config.is_file() and CONFIG_KEY in ErnieConfig.from_folder(folder).extra:
        raise CheckpointError(
            f"{config} names a reward head, but {HEAD_FILE} is not there; copy it from the model "
            f"that this one was made of, or take {CONFIG_KEY} out of config.json"
        )
    return False


def refuse_head(folder: Path, form: str) -> None:
    """Raise ConfigError for a reward model that is to become files without a place for its head."""
    if has_head(folder):
        raise ConfigError(
            f"{folder} is a reward model, and {form} has no place for its head; use erniekit "
            "export with export_format=pt, paddle or transformers, which take it along"
        )


def read_head(folder: Path) -> Tensor:
    """The head of a folder, float32 `(1, D)`; raises ConfigError where there is none."""
    if not has_head(folder):
        raise ConfigError(
            f"{folder} holds no {HEAD_FILE}; give a folder that stage: RM has written"
        )
    return load_file(folder / HEAD_FILE)[HEAD].float()


@torch.no_grad()
def fill_head(model: ErnieModel, folder: Path) -> None:
    """Take the head of a folder over into a model that has one; raises ConfigError."""
    head_1D, own_1D = read_head(folder), _head(model)
    if head_1D.shape != own_1D.shape:
        raise ConfigError(
            f"the reward head in {folder} is {tuple(head_1D.shape)}, this model wants "
            f"{tuple(own_1D.shape)}; it belongs to another model"
        )
    own_1D.copy_(head_1D)


# --- scoring ---


@dataclass(frozen=True)
class RewardModel:
    """A loaded model, called with dialogues: token ids, or where they have pictures what
    `Processor.inputs` makes of them (`ernie.vision.prompt`).
    """

    model: ErnieModel
    max_tokens: int = 8192  # of one forward pass, or one sequence where that is longer

    @torch.no_grad()
    def __call__(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """The reward of each whole dialogue, whose last token is the end of its answer.

        Dialogues are packed, and a reward does not depend on what it is packed with. Raises
        ValueError for one without tokens, and for pictures that a model does not read.
        """
        lengths = [len(_ids_and_pictures(dialogue)[0]) for dialogue in dialogues]
        if not all(lengths):
            raise ValueError("a sequence has no tokens; give prompt and answer")
        found: list[float] = []
        while len(found) < len(dialogues):
            start = stop = len(found)
            while stop == start or sum(lengths[start : stop + 1]) <= self.max_tokens:
                stop += 1
                if stop == len(dialogues):
                    break
            found += self._of_row(dialogues[start:stop])
        return found

    def _of_row(self, row: Sequence[Dialogue]) -> list[float]:
        """Of dialogues that are packed into one forward pass."""
        prompts = [self.model.prompt(*_ids_and_pictures(dialogue)) for dialogue in row]
        lengths = [len(prompt.token_ids_T) for prompt in prompts]
        ends_S = torch.tensor(lengths, device=self.model.device).cumsum(0)
        bounds_S1 = torch.nn.functional.pad(ends_S, (1, 0)).to(torch.int32)
        packed = joined(prompts)
        hidden_TD = self.model.read(packed, packed_causal(bounds_S1, lengths))
        return rewards(self.model, hidden_TD, ends_S - 1).tolist()


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of one model one after the other, each with the positions it has by itself."""
    ids, positions, modality, embeds = zip(*prompts)
    starts = [0, *accumulate(len(ids_T) for ids_T in ids)]
    seen = [(e.rows_LD, e.places_L + start) for e, start in zip(embeds, starts) if e is not None]
    return Prompt(
        torch.cat(ids),
        torch.cat(positions, -1),
        None if modality[0] is None else torch.cat(modality),
        Embeds(*map(torch.cat, zip(*seen))) if seen else None,
    )


def _ids_and_pictures(dialogue: Dialogue) -> tuple[Any, ...]:
    """What `ErnieModel.prompt` takes."""
    if isinstance(dialogue, Inputs):
        return dialogue.token_ids, dialogue.pixel_values, dialogue.grid_thw
    return (dialogue,)


def base_of(folder: Path) -> str | Path:
    """Where the weights beside a head are: the base that an adapter names, or the folder itself."""
    settings = folder / lora_files.ADAPTER_CONFIG
    return read_settings(settings).base if settings.is_file() else folder


def load(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> RewardModel:
    """The reward model in a folder that `stage: RM` has written: a whole model, or an adapter that
    is merged into the base it names. `tokenizer` of its `model` is the base's.

    Raises ConfigError or CheckpointError in a sentence.
    """
    folder = Path(folder)
    read_head(folder)
    base = base_of(folder)
    model = ernie.load(base, dtype=dtype, device=device)
    if base != folder:
        lora_files.put_in(model, folder, base)
        lora.merge_lora(model)
    take_head(model, folder)
    return RewardModel(model.requires_grad_(False).eval())
