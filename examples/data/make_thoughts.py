"""Make the demo data of a Thinking model: small sums in words, thought over before the answer.

    python examples/data/make_thoughts.py

writes sft_think-train.jsonl (20 samples, type messages) and sft_think-eval.jsonl (8) beside this
file. An answer holds its thought in front, between `<think>` and `</think>`. Some dialogues have
two questions, of which the second goes on from the first; one has an answer with label 0, which is
read and not trained. No question is in both files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NUM_TRAIN, NUM_EVAL = 20, 8
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
GOODS = (("apples", 2), ("loaves of bread", 3), ("notebooks", 4), ("tickets", 12))
Turn = tuple[str, str, str]  # question, thought, answer


def shopping(draw: random.Random) -> tuple[Turn, Turn]:
    goods, price = draw.choice(GOODS)
    number, note = draw.randint(2, 8), 100
    cost = number * price
    return (
        f"What do {number} {goods} cost at {price} euros each?",
        f"One costs {price}, so {number} cost {number} x {price} = {cost}.",
        f"They cost {cost} euros.",
    ), (
        f"And what do I get back from {note} euros?",
        f"They cost {cost}. {note} - {cost} = {note - cost}.",
        f"You get {note - cost} euros back.",
    )


def journey(draw: random.Random) -> tuple[Turn, Turn]:
    speed, hours, more = 10 * draw.randint(4, 12), draw.randint(2, 6), draw.randint(1, 3)
    way = speed * hours
    return (
        f"A train goes {speed} km an hour. How far does it get in {hours} hours?",
        f"{speed} km in each of {hours} hours: {speed} x {hours} = {way}.",
        f"It gets {way} km far.",
    ), (
        f"And if it goes on for {more} more hours?" if more > 1 else "And after one hour more?",
        f"{more} x {speed} = {more * speed} more. {way} + {more * speed} = {way + more * speed}.",
        f"Then it has gone {way + more * speed} km.",
    )


def calendar(draw: random.Random) -> tuple[Turn, Turn]:
    start, days = draw.randrange(7), draw.randint(8, 40)
    rest = days % 7
    end, before = DAYS[(start + rest) % 7], DAYS[(start + rest - 1) % 7]
    later = "1 day" if rest == 1 else f"{rest} days"
    return (
        f"Today is {DAYS[start]}. Which day is it in {days} days?",
        f"Weeks repeat: {days} = {days // 7} x 7 + {rest}. {later} after {DAYS[start]} is {end}.",
        f"It is a {end}.",
    ), (
        "And the day before that?",
        f"The day before {end} is {before}.",
        f"It is a {before}.",
    )


def comparison(draw: random.Random) -> tuple[Turn, Turn]:
    a, b = (f"{whole}.{part}" for whole, part in zip([draw.randint(2, 9)] * 2, ("9", "11")))
    c = f"{a[0]}.85"
    return (
        f"Which is larger, {a} or {b}?",
        f"Both begin with {a[0]}. With two places they are {a}0 and {b}; 90 is more than 11.",
        f"{a} is larger.",
    ), (
        f"And {c} beside them?",
        f"{c} lies between {b} and {a}0, for 85 lies between 11 and 90.",
        f"{c} is larger than {b} and smaller than {a}.",
    )


def sample(draw: random.Random) -> dict[str, Any]:
    turns = draw.choice((shopping, journey, calendar, comparison))(draw)
    messages: list[dict[str, Any]] = []
    for question, thought, answer in turns[: 1 + (draw.random() < 0.3)]:
        messages.append({"role": "user", "content": question})
        content = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": content})
    return {"messages": messages}


def main() -> None:
    draw, by_question = random.Random(1), {}
    while len(by_question) < NUM_TRAIN + NUM_EVAL:
        made = sample(draw)
        by_question.setdefault(made["messages"][0]["content"], made)
    records = list(by_question.values())
    long = next(record["messages"] for record in records if len(record["messages"]) > 2)
    long[1]["label"] = 0
    for name, part in (("train", records[:NUM_TRAIN]), ("eval", records[NUM_TRAIN:])):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in part]
        (HERE / f"sft_think-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"sft_think-{name}.jsonl: {len(lines)} samples")


if __name__ == "__main__":
    main()
