"""What does speculation gain on real text: n-gram and MTP drafts on SmolLM2, on this CPU?

    python benchmarks/speculation.py [--folder FOLDER] [--minutes 5] [--rounds 1]

The model is the imported SmolLM2 with an MTP block added, which is trained here first: the trunk is
frozen, and the block learns the trunk's own distribution of the token after next on text that comes
with this repository and with Python. `--folder` keeps the trained model, or takes what was kept.

Two sets of prompts: answers that copy from the prompt (code to be edited, a text to be condensed),
and free ones. Greedy, one request at a time, then all of a set at once. Sides are the engine
without speculation and with each method; a side's tokens must be the same as those of the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import pydoc_data.topics
import random
import shlex
import tempfile
import textwrap
import time
from pathlib import Path
from statistics import mean
from typing import Any

from harness import ROOT, seconds_of, smollm2_gguf, take_turns, write_record

QUESTION = __doc__.splitlines()[0]
NUM_TOKENS = 64
BASE = "without"
SIDES: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "n-gram, 3 tokens": {"method": "ngram", "num_speculative_tokens": 3},
    "n-gram, 5 tokens": {"method": "ngram", "num_speculative_tokens": 5},
    "MTP, 1 token": {"method": "mtp", "num_speculative_tokens": 1},
    "MTP, 2 tokens": {"method": "mtp", "num_speculative_tokens": 2},
}
# Training: tokens of a piece, pieces of a step, tokens of the trunk's distribution that are kept.
LENGTH, BATCH, NUM_LIKELIEST = 256, 2, 32
LEARNING_RATE = 3e-3
SHARE_OF_TRUNK = 0.4  # of the time, for the frozen trunk; the rest trains the block
HIDDEN_RMS = 38.0  # root mean square of SmolLM2's last hidden states


def prompts() -> dict[str, list[str]]:
    code = [textwrap.shorten, textwrap.indent, shlex.join, shlex.quote]
    paragraphs = inspect.getdoc(textwrap.TextWrapper).split("\n\n")  # type: ignore[union-attr]
    return {
        "copying": [
            f"Add type hints to this function:\n\n{inspect.getsource(function)}"
            for function in code
        ]
        + ["Repeat this text, then say what it is about:\n\n" + " ".join(paragraphs[0].split())],
        "free": [
            "What is the capital of France?",
            "Write a short poem about the sea.",
            "Explain how a bicycle stays upright.",
            "Why is the sky blue?",
            "Tell me a story about a dog named Max.",
        ],
    }


# Training of the block


def pieces(tokenizer, template) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids in pieces of LENGTH, to train on and held out."""

    def chats(name: str) -> list[int]:
        ids: list[int] = []
        for line in (ROOT / "examples" / "data" / name).read_text().splitlines():
            pair = json.loads(line)
            turns = [{"role": "user", "content": pair["src"][0]}]
            ids += template.encode(tokenizer, turns).token_ids
            ids += tokenizer.encode(pair["tgt"][0] + "<|im_end|>\n")
        return ids

    def cut(ids: list[int]) -> list[list[int]]:
        return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]

    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    manual = cut(tokenizer.encode("\n\n".join(topics)))
    held_out = manual[::40] + cut(chats("sft-eval.jsonl"))
    train = [p for i, p in enumerate(manual) if i % 40] + cut(chats("sft-train.jsonl"))
    random.Random(0).shuffle(train)
    return train, held_out


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


def seen_by_trunk(model, ids: list[int]) -> dict:
    """A piece with what the frozen trunk makes of it, computed once: hidden states, and the
    likeliest next tokens with their shares.
    """
    import torch

    from ernie.attention import packed_causal

    ids_T = torch.tensor(ids)
    whole = packed_causal(torch.tensor([0, LENGTH], dtype=torch.int32))
    with torch.no_grad():
        hidden_TD = model.hidden(ids_T, torch.arange(LENGTH), whole)
        probs_TK, tokens_TK = model.head(hidden_TD).softmax(-1).topk(NUM_LIKELIEST)
    shares_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
    return {"ids": ids_T, "hidden": hidden_TD, "shares": shares_TK, "tokens": tokens_TK}


def loss_of(model, batch: list[dict]):
    """Cross-entropy of the block with the trunk's distribution of the token after next, and how
    often both have the same likeliest token.
    """
    import torch

    from ernie.attention import packed_causal

    flat = {name: torch.cat([piece[name] for piece in batch]) for name in batch[0]}
    positions_T = torch.arange(LENGTH).repeat(len(batch))
    attend = packed_causal(torch.arange(0, len(positions_T) + 1, LENGTH, dtype=torch.int32))
    out_TD = model.hidden_after_next(flat["ids"].roll(-1), flat["hidden"], positions_T, attend)
    kept = positions_T < LENGTH - 1  # the last token of a piece has no successor in it
    scores_NV = model.head(out_TD[kept])
    shares_NK, tokens_NK = (flat[name].roll(-1, 0)[kept] for name in ("shares", "tokens"))
    wanted_N = (shares_NK * scores_NV.gather(-1, tokens_NK)).sum(-1)
    agreed_N = scores_NV.argmax(-1) == tokens_NK[:, 0]
    return (scores_NV.logsumexp(-1) - wanted_N).mean(), agreed_N.float().mean()


def train(source: Path, target: Path, minutes: float) -> dict[str, float]:
    """Train the block for so long, save the model; the numbers of the training."""
    import torch

    import ernie
    from ernie.chat import ChatTemplate

    model, tokenizer = with_block(source)
    texts, held_out_texts = pieces(tokenizer, ChatTemplate.for_folder(source))
    held_out = [seen_by_trunk(model, ids) for ids in held_out_texts]

    def evaluated() -> tuple[float, float]:
        with torch.no_grad():
            losses, agreed = zip(*(loss_of(model, [piece]) for piece in held_out))
        return mean(map(float, losses)), mean(map(float, agreed))

    before, _ = evaluated()
    start = time.perf_counter()

    def share_of_time() -> float:
        return (time.perf_counter() - start) / (60 * minutes)

    learn = []
    while len(learn) < len(texts) and share_of_time() < SHARE_OF_TRUNK:
        learn.append(seen_by_trunk(model, texts[len(learn)]))
    parameters = list(model.model.mtp.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95))
    num_steps, order, began = 0, random.Random(0), share_of_time()
    while (share := share_of_time()) < 1:
        warm_up, decay = min(1.0, (num_steps + 1) / 10), (1 - share) / (1 - began)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * max(0.05, decay)
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
        "text_tokens": len(learn) * LENGTH, "tokens": num_steps * BATCH * LENGTH,
        "seconds": seconds, "threads": torch.get_num_threads(),
    }  # fmt: skip
    (target / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


# Measurement


def measure(folder: str, drafts: dict[str, Any] | None) -> dict[str, float]:
    from fastdeploy import LLM, SamplingParams

    llm = LLM(
        folder, max_num_seqs=8, max_model_len=1024, speculative_config=drafts,
        enable_prefix_caching=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm.generate("Hello", params, use_tqdm=False)  # kernels compiled, memory touched
    numbers: dict[str, float] = {}
    for name, texts in prompts().items():
        chats = [[{"role": "user", "content": text}] for text in texts]
        before, seconds, answers = llm.engine.stats(), 0.0, []
        for chat in chats:
            (out,) = llm.chat(chat, params, use_tqdm=False)
            assert out.metrics is not None
            seconds += out.metrics.finished_time - out.metrics.first_token_time
            answers.append(out.outputs[0].token_ids)
        after = llm.engine.stats()
        offered = after.num_draft_tokens - before.num_draft_tokens
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        num_steps = after.num_steps - before.num_steps - len(chats)
        num_tokens = (NUM_TOKENS - 1) * len(chats)
        at_once_s = seconds_of(lambda: llm.chat(chats, params, use_tqdm=False))  # noqa: B023
        numbers |= {
            f"{name}, tok/s": num_tokens / seconds,
            f"{name}, tokens a step": num_tokens / num_steps,
            f"{name}, ms a step": 1000 * seconds / num_steps,
            f"{name}, acceptance": accepted / max(offered, 1),
            f"{name}, at once tok/s": NUM_TOKENS * len(chats) / at_once_s,
            f"{name}, checksum": float(hash(tuple(map(tuple, answers))) % 10**9),
        }
    return numbers


def report(sides: dict[str, dict[str, float]], training: dict[str, float]) -> None:
    table = [["side", "prompts", "drafts accepted", "tokens a step", "ms a step", "tok/s",
              "ratio", "at once tok/s", "ratio", "same tokens"]]  # fmt: skip
    base = sides[BASE]
    for side, n in sides.items():
        for name in prompts():
            get = {key.removeprefix(f"{name}, "): value for key, value in n.items() if name in key}
            ratios = [n[f"{name}, {k}"] / base[f"{name}, {k}"] for k in ("tok/s", "at once tok/s")]
            same = get["checksum"] == base[f"{name}, checksum"]
            table.append(
                [side, name, f"{get['acceptance']:.0%}" if side != BASE else "",
                 f"{get['tokens a step']:.2f}", f"{get['ms a step']:.1f}", f"{get['tok/s']:.1f}",
                 f"{ratios[0]:.2f}x", f"{get['at once tok/s']:.1f}", f"{ratios[1]:.2f}x",
                 "yes" if same else "no"]
            )  # fmt: skip

    def best(method: str, name: str) -> str:
        key = f"{name}, tok/s"
        side = max((s for s in sides if s.startswith(method)), key=lambda s: sides[s][key])
        return f"{sides[side][key] / base[key]:.2f}x ({side})"

    reading = (
        f"One request at a time, n-gram drafts give at best {best('n-gram', 'copying')} where the "
        f"answer copies and {best('n-gram', 'free')} where it does not; the MTP block gives "
        f"{best('MTP', 'copying')} and {best('MTP', 'free')}, after training for "
        f"{training['seconds']:.0f} s on {training['text_tokens']:.0f} tokens of text "
        f"({training['tokens']:.0f} with repetitions), in which its held-out loss fell from "
        f"{training['loss_before']:.2f} to {training['loss_after']:.2f} and its likeliest token "
        f"became the trunk's in {training['agreement']:.0%} of the places."
    )
    write_record(
        "speculation", QUESTION, "python benchmarks/speculation.py",
        {"model": "SmolLM2-135M-Instruct, bfloat16, with an MTP block", "tokens": NUM_TOKENS,
         "prompts": {name: len(texts) for name, texts in prompts().items()}},
        {"sides": sides, "training": training}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--folder", help="of the trained model; trained into it if it is empty")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only-train", action="store_true")
    parser.add_argument("--side")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.folder, SIDES[args.side])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / "model"
        if not (folder / "training.json").exists():
            from ernie.checkpoint.gguf import import_gguf

            import_gguf(smollm2_gguf(), Path(temporary) / "imported")
            train(Path(temporary) / "imported", folder, args.minutes)
        training = json.loads((folder / "training.json").read_text())
        if args.only_train:
            print(json.dumps(training))
            return
        arguments = ["--folder", str(folder)]
        report(take_turns(__file__, list(SIDES), args.rounds, arguments), training)


if __name__ == "__main__":
    main()
