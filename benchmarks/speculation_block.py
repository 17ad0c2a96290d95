"""An MTP block for SmolLM2, trained in minutes: what `speculation.py` measures drafts of.

The trunk is frozen. The block learns the trunk's own distribution of the token after next, on
answers that the trunk has given to prompts that are not those of the measurement; some of them are
held out. Text of another kind does not do: a block trained for six minutes on Python's manual and
on questions about it agreed with the trunk in 48 % of the places of held-out text of that kind, and
had 18 % (copying) and 9 % (free) of its drafts accepted in the measurement.
"""

from __future__ import annotations

import calendar
import colorsys
import dataclasses
import difflib
import fnmatch
import glob
import heapq
import inspect
import json
import random
import shlex
import statistics
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

# Training: tokens of a piece, pieces of a step, tokens of the trunk's distribution that are kept.
LENGTH, BATCH, NUM_LIKELIEST = 256, 2, 32
LEARNING_RATE = 3e-3
HIDDEN_RMS = 38.0  # root mean square of SmolLM2's last hidden states
NUM_SAID = 128  # tokens of an answer to learn from

FORMS = (
    "Write a short text about {}.",
    "Explain {} to a child.",
    "Why do people care about {}?",
    "Tell me a story about {}.",
    "What should a beginner know about {}?",
    "Write a poem about {}.",
)
TOPICS = (
    "bread", "the moon", "trains", "a lost key", "volcanoes", "chess", "honey bees", "rain",
    "old books", "winter", "a market", "maps", "the piano", "mountains", "tea", "a lighthouse",
    "gardens", "robots", "friendship", "the desert", "clocks", "swimming", "a grandmother",
    "electricity",
)  # fmt: skip
HELD_OUT_TOPICS = ("glass", "a river", "cats")
CODE = [statistics.mode, statistics.pvariance, statistics.harmonic_mean, statistics.quantiles,
        fnmatch.filter, textwrap.dedent, shlex.split, colorsys.rgb_to_hsv, calendar.isleap,
        heapq.nlargest, glob.glob, difflib.get_close_matches]  # fmt: skip
HELD_OUT_CODE = [colorsys.hsv_to_rgb, fnmatch.fnmatch]


def questions(topics: Iterable[str], code: Iterable[Any]) -> list[str]:
    edits = ("Add comments to this function", "Explain what this function does")
    return [form.format(topic) for topic in topics for form in FORMS] + [
        f"{edit}:\n\n{inspect.getsource(function)}" for function in code for edit in edits
    ]


def pieces(llm, texts: list[str]) -> list[dict]:
    """The model's own answers to `texts`, one after the other with their prompts, cut into pieces
    of LENGTH; `said` marks the tokens of answers.
    """
    import torch

    from fastdeploy import SamplingParams

    params = SamplingParams(temperature=0.5, max_tokens=NUM_SAID, seed=0)
    chats = [[{"role": "user", "content": text}] for text in texts]
    ids: list[int] = []
    said: list[bool] = []
    for out in llm.chat(chats, params, use_tqdm=False):
        prompt, answer = list(out.prompt_token_ids), out.outputs[0].token_ids
        ids += prompt + answer
        said += [False] * len(prompt) + [True] * len(answer)
    return [
        {"ids": torch.tensor(ids[i : i + LENGTH]), "said": torch.tensor(said[i : i + LENGTH])}
        for i in range(0, len(ids) - LENGTH + 1, LENGTH)
    ]


def with_block(folder: Path):
    """The model of `folder` in float32 with an MTP block, all frozen but the block.

    The block begins as a second last layer: its decoder layer is a copy of the trunk's last one,
    and the projection passes the normed hidden state on at about the size that layer is used to.
    """
    import torch

    import ernie

    base = ernie.load(folder, dtype=torch.float32)
    config = dataclasses.replace(base.config, num_nextn_predict_layers=1)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=0)
    model.load_state_dict(base.state_dict(), strict=False)
    (mtp,) = model.model.mtp
    mtp.block.load_state_dict(model.model.layers[-1].state_dict())
    identity = torch.eye(config.hidden_size)
    mtp.linear_proj.weight.data[:, config.hidden_size :] = HIDDEN_RMS * identity
    model.requires_grad_(False)
    mtp.requires_grad_(True)
    return model, base.tokenizer


def seen_by_trunk(model, piece: dict) -> dict:
    """A piece with what the frozen trunk makes of it, computed once: hidden states, and the
    likeliest next tokens with their shares.
    """
    import torch

    from ernie.attention import packed_causal

    whole = packed_causal(torch.tensor([0, LENGTH], dtype=torch.int32))
    with torch.no_grad():
        hidden_TD = model.hidden(piece["ids"], torch.arange(LENGTH), whole)
        probs_TK, tokens_TK = model.head(hidden_TD).softmax(-1).topk(NUM_LIKELIEST)
    shares_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
    return piece | {"hidden": hidden_TD, "shares": shares_TK, "tokens": tokens_TK}


def loss_of(model, batch: list[dict]):
    """Cross-entropy of the block with the trunk's distribution of the token after next, within
    answers; and in what share of the places both have the same likeliest token.
    """
    import torch

    from ernie.attention import packed_causal

    flat = {name: torch.cat([piece[name] for piece in batch]) for name in batch[0]}
    positions_T = torch.arange(LENGTH).repeat(len(batch))
    attend = packed_causal(torch.arange(0, len(positions_T) + 1, LENGTH, dtype=torch.int32))
    out_TD = model.hidden_after_next(flat["ids"].roll(-1), flat["hidden"], positions_T, attend)
    # The last token of a piece has no successor in it.
    kept = (positions_T < LENGTH - 1) & flat["said"].roll(-1)
    scores_NV = model.head(out_TD[kept])
    shares_NK, tokens_NK = (flat[name].roll(-1, 0)[kept] for name in ("shares", "tokens"))
    wanted_N = (shares_NK * scores_NV.gather(-1, tokens_NK)).sum(-1)
    agreed_N = scores_NV.argmax(-1) == tokens_NK[:, 0]
    return (scores_NV.logsumexp(-1) - wanted_N).mean(), agreed_N.float().mean()


def train(source: Path, target: Path, minutes: float) -> None:
    """Train the block for so long; save the model, and the numbers of the training beside it."""
    import torch

    import ernie
    from fastdeploy import LLM

    llm = LLM(str(source), max_model_len=2048, max_num_seqs=16)
    texts = pieces(llm, questions(TOPICS, CODE))
    held_out_texts = pieces(llm, questions(HELD_OUT_TOPICS, HELD_OUT_CODE))
    model, tokenizer = with_block(source)
    held_out = [seen_by_trunk(model, piece) for piece in held_out_texts]
    learn = [seen_by_trunk(model, piece) for piece in texts]

    def evaluated() -> tuple[float, float]:
        with torch.no_grad():
            losses, agreed = zip(*(loss_of(model, [piece]) for piece in held_out))
        return mean(map(float, losses)), mean(map(float, agreed))

    before, _ = evaluated()
    parameters = list(model.model.mtp.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95))
    num_steps, order, start = 0, random.Random(0), time.perf_counter()
    while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (num_steps + 1) / 10) * max(0.05, 1 - share)
        loss, _ = loss_of(model, order.sample(learn, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
    seconds = time.perf_counter() - start
    after, agreement = evaluated()
    model.tokenizer = tokenizer
    ernie.save(model.to(torch.bfloat16), target)
    numbers = {
        "loss_before": before, "loss_after": after, "agreement": agreement,
        "text_tokens": len(learn) * LENGTH, "held_out_tokens": len(held_out) * LENGTH,
        "tokens": num_steps * BATCH * LENGTH, "seconds": seconds,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    (target / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
