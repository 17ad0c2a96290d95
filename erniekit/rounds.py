"""Rounds of reinforcement learning: prompts, answers, rewards, and the batches they become.

    prompts of the stream -> answers of the policy as it stands -> rewards -> advantages, pairs
    -> (old and reference log-probabilities) -> batches of the round's steps

Every rank answers its share of the prompts, scores it and tells the others, and all make the same
batches, which the loop deals out. A round is made when the loop asks for its first batch, so by the
newest weights. Nothing random is kept: prompts follow from the place in the stream, seeds of
answers from the run's seed, the round and the prompt. A checkpoint within a round holds the batches
that are left of it; one between rounds needs nothing.

    output_dir/rollouts.jsonl      {"step", "where", "question", "reference", "answers", "rewards",
                                    "is_kept"}, one line a prompt
    output_dir/held_out.jsonl      the same without "step" and "is_kept", of the newest evaluation
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie.chat import ChatError, changes, stop_ids
from ernie.model import ErnieModel
from ernie.rollout import Answer, Sampling
from ernie.settings import ConfigError, field_types
from erniekit import groups, policy
from erniekit.build import build_model, load_adapter, read_model
from erniekit.config import Policy, Run
from erniekit.data.batch import Batch
from erniekit.data.mix import Mix
from erniekit.data.preference import PairSample
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.device_batch import Flat, to_device
from erniekit.groups import Cut, Group
from erniekit.loop import Progress
from erniekit.lora import pairs as lora_pairs
from erniekit.metrics import Metrics
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.rewards import Rewards, Scored, judged
from erniekit.samplers import Sampler
from erniekit.seeds import seed_of

log = logging.getLogger("erniekit")

ROLLOUTS_FILE = "rollouts.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
_CUT = "batches_per_step"  # beside the batches of a checkpoint


@dataclass(frozen=True)
class Task:
    """A prompt, and the record that its answers are held against."""

    where: str
    source: int  # number of the training file, which is its domain
    record: dict[str, Any]
    prompt_ids: list[int]


@dataclass
class Answered:
    """A task with its answers; `scored` in their order."""

    task: Task
    answers: list[Answer]
    texts: list[str]
    scored: list[Scored]

    @property
    def rewards(self) -> list[float]:
        return [s.reward for s in self.scored]


def is_flat(rewards: Sequence[float], most: float) -> bool:
    """Whether they are equal, or their deviation is at most so much: that of equal numbers may be
    a rounding error above zero.
    """
    return len(set(rewards)) == 1 or float(np.std(rewards)) <= most


def _as_values(answered: Answered) -> list[Any]:
    """What other ranks must know of an answered task, as JSON."""
    parts = (answered.answers, answered.scored)
    return [answered.texts, *([dataclasses.asdict(one) for one in part] for part in parts)]


def _from_values(task: Task, values: list[Any]) -> Answered:
    texts, answers, scored = values
    return Answered(task, [Answer(**a) for a in answers], texts, [Scored(**s) for s in scored])


def task_of(stream: Stream, source: int, index: int, max_prompt_tokens: int) -> Task:
    """The task in a record of a split; raises DataError for one that cannot be asked or judged."""
    encoder, records = stream.encoder, stream.sources[source]
    record = records[index]
    dialogue = encoder.dialogue(record, stream.kinds[source])
    whole = judged(record, dialogue.messages, stream.rewards)
    extra = {"tools": dialogue.tools} if dialogue.tools else {}
    try:
        ids = encoder.template.encode(encoder.tokenizer, whole["messages"], **extra).token_ids
    except ChatError as error:
        raise DataError(str(error)) from None
    if len(ids) > max_prompt_tokens:
        raise DataError(
            f"its prompt has {len(ids)} tokens; max_seq_len less max_completion_length allows "
            f"{max_prompt_tokens}"
        )
    return Task(records.where(index), source, whole, list(ids))


class Rounds:
    """The batches of a run, round by round; what a `Session` asks for as its `source`."""

    def __init__(
        self, run: Run, device: str, sampler: Sampler, rewards: Rewards, stream: Stream,
        pair_stream: Stream | None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        p = run.policy
        self.run, self.device, self.stream, self.pair_stream = run, device, stream, pair_stream
        self.sampler, self.rewards = sampler, rewards
        self.ranks = ranks
        accumulated = run.training.gradient_accumulation_steps * ranks.size
        by_answer = p.aggregation == "sequence"
        self.cut = Cut(p.num_iterations, p.num_mini_batches, accumulated, by_answer)
        self.left: list[Batch] = []  # of the round under way
        self._reference: ErnieModel | None = None

    # --- what a checkpoint holds ---

    def tensors(self) -> dict[str, Tensor]:
        if not self.left:
            return {}
        return groups.to_tensors(self.left) | {_CUT: torch.tensor(self.cut.batches_per_step)}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over the rest of a round; raises ConfigError where it was made for other settings
        than this run's.
        """
        left = dict(tensors)
        before, now = int(left.pop(_CUT)), self.cut.batches_per_step
        self.left = groups.from_tensors(left)
        told = ""
        if before != now:
            told = (
                f"whose steps have {before} batches; this run's have {now} "
                "(gradient_accumulation_steps x processes)"
            )
        elif changed := _changed(_policy_of(state["settings"], self.run.policy), self.run.policy):
            told = f"whose batches were made for other settings ({', '.join(changed)})"
        if told:
            end = state["progress"]["step"] + len(self.left) // before
            raise ConfigError(
                f"the checkpoint is within a round {told}: give the same up to step {end} "
                f"(stop_after_step={end}), where the round ends, or go on from a checkpoint at the "
                "end of a round"
            )

    # --- batches ---

    def batches(
        self, model: ErnieModel, progress: Progress, num_steps: int
    ) -> Generator[Batch, None, None]:
        """All batches from `progress` on, without end; each round by `model` as it is then."""
        records = Metrics(self.run.output, ROLLOUTS_FILE) if self.ranks.is_first else None
        if records is not None:
            records.rewind(progress.step)
        while True:
            if not self.left:
                self.left = self._round(model, progress, num_steps, records)
            while self.left:
                yield self.left.pop(0)

    def _round(
        self, model: ErnieModel, progress: Progress, num_steps: int, records: Metrics | None
    ) -> list[Batch]:
        start, step = time.monotonic(), progress.step
        number = step // self.cut.num_steps
        place = _Place(self, progress, num_steps)
        kept, dropped = self._answered(model, place, number)
        for answered, is_kept in [*((a, True) for a in kept), *((a, False) for a in dropped)]:
            if records is not None:
                records.write({"step": step + 1, **told_of(answered), "is_kept": is_kept})
        told = self._numbers(kept, dropped)
        # Every batch needs a group: one that is left out has advantages of 0, and no pair.
        missing = max(self.cut.steps_per_pass * self.cut.batches_per_step - len(kept), 0)
        advantages = self._advantages(kept + dropped)[: len(kept)]
        nothing = [[0.0] * self.run.policy.num_generations] * missing
        found = self._groups(kept + dropped[:missing], advantages + nothing)
        pairs = [groups.given_group(pair) for pair in self._given(number)]
        if self.pair_stream is None and self.run.policy.upo_mu:
            for group, answered in zip(found, kept):
                gap = self.run.policy.pair_min_gap
                group.pair = groups.best_and_worst(answered.rewards, gap)
        self._ask(model, found, pairs)
        log.info(
            "round %d: %d prompts, %d left out | reward %.4f | right %.1f %% | %.1f s",
            number + 1, len(kept) + len(dropped), len(dropped), told[0], 100 * told[1],
            time.monotonic() - start,
        )  # fmt: skip
        return list(
            groups.round_batches(
                found, pairs, told, self.cut,
                start=progress.cursor.position, end=place.position,
                seed=seed_of(self.run.training.seed, number),
            )
        )  # fmt: skip

    def _answered(
        self, model: ErnieModel, place: _Place, number: int
    ) -> tuple[list[Answered], list[Answered]]:
        """Answered prompts of a round: those that are learnt from, and those left out."""
        p = self.run.policy
        kept: list[Answered] = []
        dropped: list[Answered] = []
        for _ in range(p.max_refills + 1):
            wanted = p.prompts_per_round - len(kept)
            if not wanted:
                break
            places, tasks = zip(*islice(place.tasks(), wanted), strict=True)
            seeds = [
                [seed_of(self.run.training.seed, number, at, i) for i in range(p.num_generations)]
                for at in places
            ]
            for answered in self.answer(model, tasks, seeds, sampling_of(self.run)):
                is_dropped = p.dynamic_sampling and is_flat(answered.rewards, p.min_reward_std)
                (dropped if is_dropped else kept).append(answered)
        return kept, dropped

    def answer(
        self,
        model: ErnieModel,
        tasks: Sequence[Task],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[Answered]:
        """Tasks with answers of the policy, scored; all ranks must call it with the same."""
        own = self._answer_own(model, self.ranks.own(tasks), self.ranks.own(seeds), sampling)
        told = self.ranks.all_gather([_as_values(answered) for answered in own])
        found = []
        for number, task in enumerate(tasks):
            rank, place = number % self.ranks.size, number // self.ranks.size
            is_here = rank == self.ranks.rank
            found.append(own[place] if is_here else _from_values(task, told[rank][place]))
        return found

    def _answer_own(
        self,
        model: ErnieModel,
        tasks: Sequence[Task],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[Answered]:
        prompts = [task.prompt_ids for task in tasks]
        given = self.sampler(model, prompts, seeds, sampling)
        if not tasks:  # of a rank that got none of the last few
            return []
        tokenizer = self.stream.encoder.tokenizer
        stops, end = stop_ids(tokenizer), self._end
        found, records, texts, dialogues, places = [], [], [], [], list[str]()
        for task, answers in zip(tasks, given, strict=True):
            own = [tokenizer.decode([i for i in a.token_ids if i not in stops]) for a in answers]
            found.append(Answered(task, answers, own, []))
            texts += own
            records += [task.record] * len(own)
            places += [task.where] * len(own)
            dialogues += [
                [*task.prompt_ids, *(i for i in a.token_ids if i not in stops), *end]
                for a in answers
            ]
        scored = iter(self.rewards(records, texts, dialogues, places))
        for answered in found:
            answered.scored = [next(scored) for _ in answered.answers]
        return found

    @cached_property
    def _end(self) -> list[int]:
        """What a reward model reads its score at: how answers ended in its training, whatever
        these ended with; nothing where no model scores.
        """
        if self.rewards.score is None:
            return []
        folder, encoder = str(self.run.policy.reward_model), self.stream.encoder
        try:
            if told := changes(folder, encoder.template, encoder.tokenizer):
                log.warning(
                    "reward_model=%s reads dialogues as the policy writes them, and %s: its scores "
                    "may mean little", folder, told,
                )  # fmt: skip
            return [encoder.template.end_id(encoder.tokenizer)]
        except ChatError as error:
            raise ConfigError(f"reward_model={folder} cannot read the answers: {error}") from None

    def _numbers(self, kept: Sequence[Answered], dropped: Sequence[Answered]) -> list[float]:
        """What is told of a round, in the order of `policy.TOLD`."""
        scored = [s for a in [*kept, *dropped] for s in a.scored]
        answers = [answer for a in [*kept, *dropped] for answer in a.answers]
        log_probs = [value for answer in answers for value in answer.log_probs]
        return [
            float(np.mean([s.reward for s in scored])),
            float(np.mean([s.is_right for s in scored])),
            float(np.mean([len(answer.token_ids) for answer in answers])),
            float(np.mean([answer.is_cut for answer in answers])),
            -float(np.mean(log_probs)),  # without bias if drawn at temperature 1 from all tokens
            len(dropped) / (len(kept) + len(dropped)),
        ]

    def _advantages(self, answered: Sequence[Answered]) -> list[list[float]]:
        """Of each answer of a round, of prompts that are left out too: they are part of what is
        usual in their file.
        """
        p = self.run.policy
        rewards_PG = torch.tensor([a.rewards for a in answered], dtype=torch.float64)
        if p.normalize_rewards:
            domain_P = torch.tensor([a.task.source for a in answered])
            rewards_PG = policy.normalised_by_domain(rewards_PG, domain_P)
        return policy.group_advantages(rewards_PG, divides_by_std=p.advantage_std).tolist()

    def _groups(
        self, used: Sequence[Answered], advantages: Sequence[Sequence[float]]
    ) -> list[Group]:
        """Rows of groups, with advantages and the rollout's log-probabilities of their tokens."""
        found = []
        for answered, own in zip(used, advantages):
            answers = [answer.token_ids for answer in answered.answers]
            group = groups.sampled_group(answered.task.prompt_ids, answers)
            lengths = [len(answer) for answer in answers]
            rollout = [value for answer in answered.answers for value in answer.log_probs]
            group.numbers |= {
                "old_N": np.array(rollout, np.float32),
                "trust_N": np.ones(sum(lengths), np.float32),
                "advantage_N": np.repeat(np.array(own, np.float32), lengths),
            }
            found.append(group)
        return found

    def _given(self, number: int) -> list[PairSample]:
        """Pairs of the file for a round, as many as it has prompts; unusable ones are left out."""
        if self.pair_stream is None:
            return []
        size = self.run.policy.prompts_per_round
        found = self.pair_stream.samples(groups.Cursor(number * size), (number + 1) * size)
        pairs = [drawn.sample for drawn in found if isinstance(drawn.sample, PairSample)]
        if any(pair.media and pair.media.pictures for pair in pairs):
            raise DataError(
                "pair_dataset_path holds pairs about pictures, which stage: UPO does not read; "
                "give pairs of text, or use stage: DPO"
            )
        return pairs

    # --- log-probabilities by the arithmetic of training ---

    def _ask(self, model: ErnieModel, found: list[Group], pairs: list[Group]) -> None:
        """Fill in old log-probabilities, where they are not the rollout's, and the reference's."""
        p = self.run.policy
        if p.rollout_correction != "none":
            for group, values_N in zip(found, self._values(model, found)):
                rollout_N = torch.from_numpy(group.numbers["old_N"])
                trust_N = policy.trust(
                    torch.from_numpy(values_N),
                    rollout_N,
                    correction=p.rollout_correction,
                    low=p.correction_low,
                    high=p.correction_high,
                )
                group.numbers |= {"old_N": values_N, "trust_N": trust_N.numpy()}
        if p.has_reference:
            everything = found + pairs
            with self._as_reference(model) as reference:
                for group, values_N in zip(everything, self._values(reference, everything)):
                    group.numbers["reference_N"] = values_N

    @contextlib.contextmanager
    def _as_reference(self, model: ErnieModel) -> Iterator[ErnieModel]:
        """The model as training found it: with adapters off, or a frozen one of its own."""
        run = self.run
        if run.is_own_reference:
            with _without_adapters(model):
                yield model
            return
        if self._reference is None:
            if run.model.lora_path:
                self._reference = build_model(run, self.device)
                load_adapter(self._reference, run, Path(run.model.lora_path))
            else:
                self._reference = read_model(run, self.device)
            self._reference.requires_grad_(False)
        yield self._reference

    @torch.no_grad()
    def _values(self, model: ErnieModel, wanted: Sequence[Group]) -> list[np.ndarray]:
        """Log-probabilities of the labelled tokens of each group, float32; each rank asks about its
        share and all ranks learn of all.
        """
        if not wanted:
            return []
        own = iter(self._own_values(model, self.ranks.own(wanted)))
        found = [
            torch.from_numpy(next(own))
            if number % self.ranks.size == self.ranks.rank
            else torch.zeros(group.num_labels)
            for number, group in enumerate(wanted)
        ]
        return [values_N.numpy() for values_N in self.ranks.all_reduce(found)]

    def _own_values(self, model: ErnieModel, wanted: Sequence[Group]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        limit = self.run.data.max_seq_len * self.run.training.batch_size
        rest = list(wanted)
        while rest:
            size, part = 0, list[Group]()
            while rest and (not part or size + len(rest[0].token_ids) <= limit):
                part.append(rest.pop(0))
                size += len(part[-1].token_ids)
            batch = to_device(groups.plain_batch(part), model.device)
            assert isinstance(batch, Flat)
            chunk = self.run.model.loss_subbatch_seqlen
            values_N = policy.log_probs(model, batch, chunk_size=chunk).cpu().numpy()
            ends = np.cumsum([group.num_labels for group in part])
            found += np.split(values_N, ends[:-1])
        return found


def _policy_of(settings: Mapping[str, Any], now: Policy) -> Policy:
    """That of a checkpoint's settings; what they do not know is as it is now."""
    known = {key: settings[key] for key in field_types(Policy) if key in settings}
    return dataclasses.replace(now, **known)


def _changed(before: Policy, now: Policy) -> list[str]:
    """The settings for which batches that were made by those `before` are not what is asked now.

    What they hold and the loss does not read is no change.
    """
    keys = ["advantage_std", "normalize_rewards"]
    if before.aggregation != now.aggregation:
        keys += ["policy_loss", "loss_aggregation"]
    if before.correction != now.correction:
        keys += ["rollout_correction", "correction_low", "correction_high"]
    if (before.has_reference, before.upo_mu > 0) < (now.has_reference, now.upo_mu > 0):
        keys += ["kl_coef", "upo_mu"]
    values = [(key, getattr(before, key), getattr(now, key)) for key in keys]
    return [f"{key} {old} -> {new}" for key, old, new in values if old != new]


@contextlib.contextmanager
def _without_adapters(model: ErnieModel) -> Iterator[None]:
    """Inside, the model computes what it computed before it had adapters (of plain LoRA)."""
    adapters = [pair for _, pair, _ in lora_pairs(model)]
    scales = [pair.scale for pair in adapters]
    for pair in adapters:
        pair.scale = 0.0
    try:
        yield
    finally:
        for pair, scale in zip(adapters, scales, strict=True):
            pair.scale = scale


class _Place:
    """Where in the stream of prompts a round goes on; in a curriculum, in files of its phase."""

    def __init__(self, rounds: Rounds, progress: Progress, num_steps: int) -> None:
        run = rounds.run
        self.stream, self.position = rounds.stream, progress.cursor.position
        self.mix, self.first_source = rounds.stream.mix, 0
        self.room = run.data.max_seq_len - run.policy.max_completion_length
        if shares := run.policy.curriculum_shares:
            step, before = progress.step, progress.step - rounds.cut.num_steps
            phase, sizes = phase_of(step, num_steps, shares), run.policy.phase_sizes
            if step and phase_of(before, num_steps, shares) != phase:
                self.position = 0
            self.first_source = sum(sizes[:phase])
            files = slice(self.first_source, self.first_source + sizes[phase])
            is_mixed = sizes[phase] > 1
            self.mix = Mix(
                self.mix.sizes[files],
                self.mix.weights[files] if is_mixed else [1.0],
                strategy=run.data.mix_strategy if is_mixed else "concat",
                shuffle=run.data.random_shuffle,
                limit=run.data.num_samples_each_epoch,
                seed=run.training.seed,
            )

    def tasks(self) -> Iterator[tuple[int, Task]]:
        """Usable tasks from here on, each with its place."""
        stream, faults, num_idle = self.stream, self.stream.faults, 0
        for source, index in self.mix.draws(self.position):
            self.position += 1
            source += self.first_source
            faults.read += 1
            try:
                task = task_of(stream, source, index, self.room)
            except DataError as error:
                faults.add(stream.sources[source].where(index), error)
                faults.judge()
                num_idle += 1
                stream.check_use(num_idle)
                continue
            num_idle = 0
            yield self.position - 1, task


def phase_of(step: int, num_steps: int, shares: Sequence[float]) -> int:
    """Number of the phase of a step, counted from 0, by the shares of the steps."""
    ends = np.cumsum(shares) / np.sum(shares) * num_steps
    return min(int(np.searchsorted(ends, step, side="right")), len(shares) - 1)


def sampling_of(run: Run) -> Sampling:
    p = run.policy
    return Sampling(
        p.max_completion_length, p.rollout_temperature, p.rollout_top_p, p.rollout_top_k
    )


def told_of(answered: Answered) -> dict[str, Any]:
    """What the files of rounds and evaluations say of a prompt."""
    record = answered.task.record
    return {
        "where": answered.task.where,
        "question": str(record["messages"][-1].get("content") or ""),
        "reference": record["answer"],
        "answers": answered.texts,
        "rewards": answered.rewards,
    }
