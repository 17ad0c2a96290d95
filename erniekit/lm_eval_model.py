"""A model of ours as lm-eval's `LM`, and its tasks run on it. Needs the package `lm_eval`.

Log-likelihoods are computed over packed rows: texts lie one after the other in one flat batch and
never see each other, so nothing is padded; texts that share all inputs (the one-token options of a
question) are computed once. Text is tokenised as lm-eval's own Hugging Face model does for a
tokenizer that adds nothing by itself. Prompts are plain text; chat templates are not applied.

Legend: T tokens of the flat batch, R rows that meet the vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager, get_task_dict

from ernie.attention import packed_causal
from ernie.chat import stop_ids
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.settings import ConfigError, did_you_mean
from ernie.tokenizer import Detokenizer
from erniekit.config import Reporting
from erniekit.losses import score_targets

_BATCH_TOKENS = 4096  # of a forward pass; a longer text is a batch of its own
_DEFAULT_NEW_TOKENS = 256  # lm-eval's own
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@dataclass(frozen=True)
class Scored:
    """A text to be scored: the last `num_scored` of `token_ids`, given those before them."""

    token_ids: tuple[int, ...]
    num_scored: int

    @property
    def scored(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_scored :]


class LanguageModel(LM):
    """`model`, which has a tokenizer; `chunk_size` rows meet the vocabulary at once."""

    def __init__(self, model: ErnieModel, chunk_size: int) -> None:
        super().__init__()
        assert model.tokenizer is not None
        self.model, self.tokenizer, self.chunk_size = model, model.tokenizer, chunk_size
        self.max_length = model.config.max_position_embeddings
        first, last = self.tokenizer.bos_id, self.tokenizer.eos_id
        prefix_id = last if first is None else first
        if prefix_id is None:
            raise ConfigError("the tokenizer has neither bos nor eos, with which texts would begin")
        self.prefix_id = prefix_id

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of the continuation, whether each token is the likeliest)
        for requests of (context, continuation).
        """
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` where it is longer."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_id, self.max_length, 1):
                context, scored = utils.make_disjoint_window(window)
                windows.append(Scored((*context, *scored), len(scored)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scores(windows)):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to the first of its stop strings."""
        return [self._continuation(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> Scored:
        """Spaces between the two belong to the continuation, as they do in training."""
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        before = self.tokenizer.encode(context) if context else [self.prefix_id]
        if context:
            scored = self.tokenizer.encode(context + continuation)[len(before) :]
        else:
            scored = self.tokenizer.encode(continuation)
        kept = [*before, *scored][-(self.max_length + 1) :]
        return Scored(tuple(kept), min(len(scored), len(kept) - 1))

    @torch.no_grad()
    def _scores(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        owners: dict[tuple[int, ...], list[int]] = {}
        for number, text in enumerate(texts):
            owners.setdefault(text.token_ids[:-1], []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for inputs in _batches(sorted(owners, key=len, reverse=True)):
            hidden_TD, ends = self._hidden(inputs), _ends(inputs)
            asked = [(n, end) for ids, end in zip(inputs, ends) for n in owners[ids]]
            lengths = [texts[n].num_scored for n, _ in asked]
            rows = [torch.arange(end - length, end) for (_, end), length in zip(asked, lengths)]
            wanted = [i for n, _ in asked for i in texts[n].scored]
            hidden_RD = hidden_TD[torch.cat(rows).to(hidden_TD.device)]
            targets_R = torch.tensor(wanted, device=hidden_TD.device)
            values_R, is_top_R = score_targets(self.model, hidden_RD, targets_R, self.chunk_size)
            for (n, _), values, is_top in zip(
                asked, values_R.split(lengths), is_top_R.split(lengths)
            ):
                found[n] = float(values.double().sum()), bool(is_top.all())
        return [found[n] for n in range(len(texts))]

    def _hidden(self, inputs: Sequence[tuple[int, ...]]) -> torch.Tensor:
        device = self.model.device
        ids_T = torch.tensor([i for ids in inputs for i in ids], device=device)
        positions_T = torch.cat([torch.arange(len(ids)) for ids in inputs]).to(device)
        bounds = torch.tensor([0, *_ends(inputs)], dtype=torch.int32, device=device)
        return self.model.hidden(ids_T, positions_T, packed_causal(bounds))

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS)
        if unknown := options.keys() - _GENERATION_KEYS:
            raise ConfigError(
                f"generation_kwargs of a task has {', '.join(sorted(unknown))}; this model knows "
                f"{', '.join(sorted(_GENERATION_KEYS))}"
            )
        until, most = [s for s in options["until"] if s], options["max_gen_toks"]
        ids = self.tokenizer.encode(context)[-max(self.max_length - most, 1) :]
        stops = stop_ids(self.tokenizer)
        stream, text = Detokenizer(self.tokenizer), ""
        for token in generate(
            self.model,
            ids or [self.prefix_id],
            max_tokens=most,
            temperature=options.get("temperature", 1.0 if options["do_sample"] else 0.0),
            top_p=options.get("top_p", 1.0),
            stop_ids=sorted(stops),
        ):
            if token in stops:
                break
            text += stream.push([token])
            if any(stop in text for stop in until):
                break
        text += stream.flush()
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)]


def _batches(inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Texts in groups of at most `_BATCH_TOKENS` tokens."""
    batch: list[tuple[int, ...]] = []
    for ids in inputs:
        if batch and sum(map(len, batch)) + len(ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _ends(inputs: Sequence[tuple[int, ...]]) -> list[int]:
    total = 0
    return [total := total + len(ids) for ids in inputs]


def known_tasks(reporting: Reporting) -> TaskManager:
    """Where `lm_eval_tasks` are found, all of them whole.

    Raises ConfigError for a task that is not known, whose data cannot be had, or is less than the
    examples that are asked for.
    """
    names, own = list(reporting.lm_eval_tasks), reporting.lm_eval_task_path
    if own is not None and not Path(own).is_dir():
        raise ConfigError(f"lm_eval_task_path={own} is no folder; give one that holds task files")
    manager = TaskManager(include_path=own, include_defaults=own is None)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"lm_eval_tasks: there is no task {name!r}{did_you_mean(name, manager.all_tasks)}"
            )
        try:
            tasks = list(_leaves(get_task_dict([name], manager)))
        except (OSError, DatasetsError) as error:  # a file or the network is missing
            told = " ".join(str(error).split())
            raise ConfigError(f"the data of {name} cannot be had: {told}") from error
        for task in tasks:
            _check_examples(task, reporting.lm_eval_num_fewshot)
    return manager


def _leaves(tasks: dict[Any, Any]) -> Iterator[Task]:
    """The tasks of groups and their groups."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield task


def _check_examples(task: Task, wanted: int | None) -> None:
    given = task.get_config("num_fewshot")
    wanted = given if wanted is None or given == 0 else wanted  # as lm-eval decides
    if not wanted or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return
    # A question is not an example of itself.
    is_asked = task.config.fewshot_split == task.config.test_split
    found = len(list(task.fewshot_docs() or ())) - is_asked
    if wanted > found:
        raise ConfigError(
            f"lm_eval_num_fewshot={wanted} is more than the {max(found, 0)} examples that "
            f"{task.config.task} has; give fewer"
        )


def run_tasks(
    model: ErnieModel, reporting: Reporting, chunk_size: int, manager: TaskManager
) -> dict[str, dict[str, float]]:
    """The metrics of each task of `lm_eval_tasks`, by name; `manager` is that of `known_tasks`."""
    found = simple_evaluate(
        LanguageModel(model, chunk_size),
        tasks=list(reporting.lm_eval_tasks),
        num_fewshot=reporting.lm_eval_num_fewshot,
        limit=reporting.lm_eval_limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and key != "sample_len"
        }
        for task, values in found["results"].items()
    }
