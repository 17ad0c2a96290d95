"""UPO: reinforcement learning with verifiable rewards, and a loss of pairs on the same policy.

    prompts -> rounds (answers, rewards, advantages, pairs) -> (as in supervised fine-tuning)

L = L_PPO + mu L_DPO; with mu 0 it is PPO with the advantages of groups (GRPO, GSPO), with
`policy_loss: none` online DPO. A round is made by the policy as it is and gives the batches of
`num_iterations` x `num_mini_batches` steps (`erniekit.rounds`); the loop, checkpoints and resuming
are those of `erniekit.recipes.sft`. Evaluation draws nothing: it scores the likeliest answers.

Source: ERNIE 4.5 report (unified preference optimisation; its coefficients are not public).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice

import numpy as np
import torch

from ernie.model import ErnieModel
from ernie.rollout import Sampling
from ernie.settings import ConfigError
from erniekit import reward_model
from erniekit.build import config_of
from erniekit.checkpoint import replace_text
from erniekit.config import Run, resolved
from erniekit.data.batch import Batch
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream, stream
from erniekit.method import Method
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.policy import Objective, policy
from erniekit.recipes import sft
from erniekit.rewards import Rewards, Scorer
from erniekit.rounds import HELD_OUT_FILE, Rounds, Task, task_of, told_of
from erniekit.samplers import Own, Served

log = logging.getLogger("erniekit")


def run(run: Run, device: str, ranks: Ranks = ALONE) -> int:
    """Train as `run` says; returns the exit code of the process."""
    check_ranks(run, ranks)
    run = resolved(run, device)
    if ranks.is_first and run.data.files("train") and run.data.files("eval"):
        _compare(run)
    return sft.train(run, device, method(run, device, ranks=ranks), ranks)


def check_ranks(run: Run, ranks: Ranks) -> None:
    """Raises ConfigError for settings that cannot go with so many processes."""
    if ranks.shards > 1 and run.parallel.sharding in ("stage2", "stage3"):
        raise ConfigError(
            f"sharding={run.parallel.sharding} cuts the weights by which every rank answers its "
            "own prompts; use stage1, or none"
        )
    steps = run.policy.num_mini_batches * run.training.gradient_accumulation_steps * ranks.size
    if run.policy.prompts_per_round < steps:
        raise ConfigError(
            f"prompts_per_round={run.policy.prompts_per_round} cannot be cut into {steps} batches "
            f"(num_mini_batches x gradient_accumulation_steps x {ranks.size} processes); give more "
            "prompts"
        )


def method(run: Run, device: str, *, is_kept: bool = True, ranks: Ranks = ALONE) -> Method:
    """The policy loss on rounds, and the reward of the likeliest answers to held-out prompts."""
    del is_kept  # nothing is computed before training
    p = run.policy
    objective = Objective(
        p.policy_loss, p.clip_low, p.clip_high, p.kl_coef, p.upo_mu, run.preferences.beta
    )
    rewards = Rewards(p, _scorer(run, device))
    loss = partial(
        policy,
        objective=objective,
        terms=sft.terms(run),
        chunk_size=run.model.loss_subbatch_seqlen,
    )
    own, source, count_steps = Own(run, device), None, None
    held_out = cache(lambda: _held_out(run, own, rewards, ranks))
    evaluate = partial(evaluate_rewards, run=run, held_out=held_out)
    if run.data.train_dataset_path:
        sampler = Served(run, device, ranks) if p.rollout_server else own
        prompts = stream(run, "train")
        source = Rounds(run, device, sampler, rewards, prompts, _pairs(run), ranks)
        count_steps = partial(_num_steps, run, prompts)
    return Method(
        loss,
        evaluate,
        source=source,
        metric="eval_reward",
        count_steps=count_steps,
        num_left_out=lambda: held_out()[0].stream.faults.total,
    )


def _scorer(run: Run, device: str) -> Scorer | None:
    """The reward model of a run, as a function of token ids; None where there is none."""
    folder = run.policy.reward_model
    if folder is None or "model" not in run.policy.reward:
        return None
    score = reward_model.load(folder, device=device)
    wanted = config_of(run.model.model_name_or_path).vocab_size
    if score.model.config.vocab_size != wanted:
        raise ConfigError(
            f"reward_model={folder} has a vocabulary of {score.model.config.vocab_size} and the "
            f"policy one of {wanted}; give one that was trained from the same kind of model"
        )
    return score


def _pairs(run: Run) -> Stream | None:
    """The pairs of a file, for offline UPO, read as `stage: DPO` reads them."""
    p = run.policy
    if not p.pair_dataset_path:
        return None
    data = dataclasses.replace(
        run.data,
        train_dataset_type=p.pair_dataset_type,
        train_dataset_path=p.pair_dataset_path,
        train_dataset_prob=(1.0,) * len(p.pair_dataset_path),
    )
    model = dataclasses.replace(run.model, stage="DPO")
    return stream(dataclasses.replace(run, data=data, model=model), "train")


def _num_steps(run: Run, prompts: Stream) -> int:
    """Steps of the rounds in which every prompt is asked as often as there are epochs."""
    p = run.policy
    num_prompts = prompts.epoch_size * run.training.num_train_epochs
    num_rounds = max(math.ceil(num_prompts / p.prompts_per_round), 1)
    num_steps = num_rounds * p.num_iterations * p.num_mini_batches
    log.info("%d rounds of %d prompts: %d steps", num_rounds, p.prompts_per_round, num_steps)
    return num_steps


def _compare(run: Run) -> None:
    """Warn of held-out prompts that are trained on."""
    trained, held_out = (_prompts(stream(run, split)) for split in ("train", "eval"))
    known = set(islice(trained, run.data.max_estimate_samples))
    asked = list(islice(held_out, run.data.max_estimate_samples))
    common = [prompt for prompt in asked if prompt in known]
    sft.tell_overlap(common, asked, "prompts", "eval_reward")


def _prompts(source: Stream) -> Iterator[str]:
    """All prompts of a split, as text; records that cannot be read are told of elsewhere."""
    for records, kind in zip(source.sources, source.kinds):
        for index in range(len(records)):
            with contextlib.suppress(DataError):
                messages = source.encoder.dialogue(records[index], kind).messages
                yield json.dumps(messages[:-1])


@torch.no_grad()
def evaluate_rewards(
    model: ErnieModel,
    batches: Iterable[Batch],
    ranks: Ranks = ALONE,
    *,
    run: Run,
    held_out: Callable[[], tuple[Rounds, list[Task]]],
) -> dict[str, float]:
    """eval_reward, eval_right, eval_length (tokens), eval_prompts and eval_seconds.

    `batches` are not read: they have no records. `max_evaluate_steps` counts so many times
    `prompts_per_round` prompts. The answers are left in `held_out.jsonl`.
    """
    del batches, ranks  # the rounds know theirs
    start, p = time.monotonic(), run.policy
    rounds, tasks = held_out()
    limit = run.training.max_evaluate_steps * p.prompts_per_round
    tasks = tasks[: limit if limit > 0 else None]
    sampling = Sampling(p.max_completion_length, temperature=0.0)
    answered = rounds.answer(model, tasks, [[0]] * len(tasks), sampling)
    scored = [a.scored[0] for a in answered]
    lengths = [len(a.answers[0].token_ids) for a in answered]
    if rounds.ranks.is_first:
        lines = [json.dumps(told_of(a), ensure_ascii=False) + "\n" for a in answered]
        run.output.mkdir(parents=True, exist_ok=True)
        replace_text(run.output / HELD_OUT_FILE, "".join(lines))
    return {
        "eval_reward": float(np.mean([s.reward for s in scored])),
        "eval_right": float(np.mean([s.is_right for s in scored])),
        "eval_length": float(np.mean(lengths)),
        "eval_prompts": len(tasks),
        "eval_seconds": time.monotonic() - start,
    }


def _held_out(run: Run, own: Own, rewards: Rewards, ranks: Ranks) -> tuple[Rounds, list[Task]]:
    """The tasks of the evaluation data, and what answers them: always our own generator."""
    asked, found = stream(run, "eval"), []
    room = run.data.max_seq_len - run.policy.max_completion_length
    for source, index in islice(asked.mix.draws(), asked.epoch_size):
        try:
            found.append(task_of(asked, source, index, room))
        except DataError as error:
            asked.faults.add(asked.sources[source].where(index), error)
    asked.faults.judge(at_end=True)
    if not found:
        raise DataError("no record of the evaluation data can be asked; see the warnings above")
    return Rounds(run, own.device, own, rewards, asked, None, ranks), found
