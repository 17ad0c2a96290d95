"""Make the demo data of tool calls: small questions whose right call is known.

    python examples/data/make_tool_calls.py

writes, beside this file and of type messages, fc-train.jsonl (96 samples) and fc-eval.jsonl (24),
and a smaller pair under the names of ERNIEKit's, function-call-train.jsonl (20) and
function-call-eval.jsonl (8). Each asks for the weather, a timer or a conversion of units; some for
two at once (parallel calls), some go on with the result and an answer, some need no tool. No
question is in both files of a pair.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETS = {"fc": (1, 96, 24), "function-call": (2, 20, 8)}  # seed, samples of training, of evaluation
CITIES = "Oslo Lima Cairo Delhi Tokyo Paris Quito Accra Berlin Dublin Athens Madrid".split()  # noqa: SIM905
UNITS = {("miles", "km"): 1.609344, ("feet", "m"): 0.3048, ("pounds", "kg"): 0.45359237}
SKIES = ("sunny", "cloudy", "rainy", "windy")
SMALL_TALK = (
    ("Good morning!", "Good morning! How can I help?"),
    ("Thank you very much.", "You are welcome."),
    ("Who are you?", "I am an assistant with a few tools."),
    ("Say yes.", "Yes."),
)
Case = tuple[
    str, str, dict[str, Any], dict[str, Any], str
]  # question, tool, arguments, result, answer


def tool(name: str, description: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", "The weather in a city.", city="string"),
    tool("set_timer", "Start a timer.", minutes="integer"),
    tool("convert", "Convert a value.", value="number", source="string", target="string"),
]


def weather(draw: random.Random) -> Case:
    city, sky = draw.choice(CITIES), draw.choice(SKIES)
    question = draw.choice(("what is the weather in {}?", "how is the weather in {}?"))
    answer = f"It is {sky} in {city}."
    return question.format(city), "get_weather", {"city": city}, {"sky": sky}, answer


def timer(draw: random.Random) -> Case:
    minutes = draw.randint(2, 59)
    question = draw.choice(("set a timer for {} minutes.", "wake me in {} minutes."))
    answer = f"The timer runs for {minutes} minutes."
    return question.format(minutes), "set_timer", {"minutes": minutes}, {"ok": True}, answer


def conversion(draw: random.Random) -> Case:
    (source, target), factor = draw.choice(list(UNITS.items()))
    value = draw.randint(2, 99)
    arguments = {"value": value, "source": source, "target": target}
    found = round(value * factor, 2)
    answer = f"{value} {source} are {found} {target}."
    return (
        f"how many {target} are {value} {source}?",
        "convert",
        arguments,
        {"value": found},
        answer,
    )


def sample(draw: random.Random) -> dict[str, Any]:
    """One record; its question is that of one case, of two, or small talk."""
    if draw.random() < 0.1:
        question, answer = draw.choice(SMALL_TALK)
        return record(question, {"role": "assistant", "content": answer})
    kinds = draw.sample((weather, timer, conversion), 2 if draw.random() < 0.2 else 1)
    cases = [kind(draw) for kind in kinds]
    question = " And ".join(case[0] for case in cases)
    functions = [{"name": name, "arguments": arguments} for _, name, arguments, _, _ in cases]
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": f | {"arguments": json.dumps(f["arguments"])},
        }
        for i, f in enumerate(functions)
    ]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    if draw.random() < 0.4:
        for call, case in zip(calls, cases):
            result = json.dumps(case[3])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        answer = " ".join(case[4] for case in cases)
        messages.append({"role": "assistant", "content": answer})
    return record(question[0].upper() + question[1:], *messages)


def record(question: str, *answers: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, *answers], "tools": TOOLS}


def main() -> None:
    for name, (seed, num_train, num_eval) in SETS.items():
        draw, by_question = random.Random(seed), {}
        while len(by_question) < num_train + num_eval:
            made = sample(draw)
            by_question.setdefault(made["messages"][0]["content"], made)
        records = list(by_question.values())
        for part, chosen in (("train", records[:num_train]), ("eval", records[num_train:])):
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in chosen]
            (HERE / f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{name}-{part}.jsonl: {len(lines)} samples")


if __name__ == "__main__":
    main()
