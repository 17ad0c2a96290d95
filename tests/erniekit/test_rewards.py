"""Rewards: each rule, tasks of reasoning-gym, functions of the user, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from ernie.settings import ConfigError
from erniekit.config import Policy
from erniekit.data import tasks
from erniekit.data.sources import DataError
from erniekit.data.tasks import Tasks
from erniekit.rewards import Rewards, judged


def score(text: str, record: dict, **settings) -> float:
    [found] = Rewards(Policy(**settings))([record], [text], [[1, 2, 3]], ["a.jsonl:7"])
    return found.reward


@pytest.mark.parametrize(
    ("rule", "record", "right", "wrong"),
    [
        ("exact", {"answer": "New  York"}, " new york\n", "New York City"),
        ("number", {"answer": "it is 1,200"}, "so 3 x 400 is 1200.0", "1200 or 1201"),
        ("number", {"answer": "-7"}, "x = -7", "x = 7"),
        ("number", {"answer": "-5"}, "x = \u22125", "x = 5"),
        ("number", {"answer": "\u22125"}, "x = -5", "x = 5"),
        ("number", {"answer": "12"}, "it takes 10-12", "it takes -12"),
        ("number", {"answer": "12"}, "from 10.-12", "from 10, -12"),
        ("number", {"answer": ".5"}, "1-.5", "1 + -.5"),
        ("regex", {"answer": "", "pattern": r"[ab]+"}, "abba", "abbac"),
        ("exact", {"answer": "Yes."}, "<think>\nNo?\n</think>\n\nYes.", "<think>\nYes."),
        ("number", {"answer": "7"}, "3 + 4, so\n</think>\n\nIt is 7.", "7</think>It is seven."),
        ("regex", {"answer": "", "pattern": r"[ab]+"}, "<think>c</think>ab", "ab</think>c"),
    ],
)
def test_rules_tell_right_from_wrong(rule, record, right, wrong) -> None:
    assert score(right, record, reward=(rule,)) == 1
    assert score(wrong, record, reward=(rule,)) == 0
    assert score(right, record | {"reward": rule}) == 1  # the record names its rule


def test_a_pattern_says_where_the_answer_stands() -> None:
    settings = {"reward": ("exact", "format"), "reward_weights": (1.0, 0.25)}
    record, pattern = {"answer": "4"}, r"<answer>(.*?)</answer>"
    scores = {
        text: score(text, record, answer_pattern=pattern, **settings)
        for text in ("4", "<answer>5</answer>", "no: <answer>5</answer> <answer> 4 </answer>")
    }
    assert list(scores.values()) == [0, 0.25, 1.25]
    either = r"<answer>(.*?)</answer>|#### *(\S+)"  # the second branch leaves the first group out
    assert [score(text, record, reward=("exact",), answer_pattern=either)
            for text in ("#### 4", "#### 5 <answer>4</answer>")] == [0, 1]  # fmt: skip


def test_the_record_is_read_by_the_pattern_like_the_answer() -> None:
    """Where it is found in it: records hold the bare answer, or one with its derivation."""
    settings = {"reward": ("exact",), "answer_pattern": r"#### *(\S+)"}
    for held_right in ("4", "2 + 2 is 4\n#### 4"):
        for text, wanted in (("so #### 4", 1), ("2 + 2 is 4\n#### 5", 0), ("4", 0)):
            assert score(text, {"answer": held_right}, **settings) == wanted


def test_what_is_right_is_the_last_answer_without_its_thought_or_the_records_own() -> None:
    messages = [
        {"role": "user", "content": "6 days after Monday?"},
        {"role": "assistant", "content": "<think>\n6 < 7.\n</think>\n\nIt is a Sunday."},
    ]
    record = {"messages": messages, "size": 3}
    found = judged(record, messages, ("exact",))
    assert found == {"answer": "It is a Sunday.", "size": 3, "messages": messages[:1]}
    assert judged(record | {"answer": "Sunday"}, messages, ("exact",))["answer"] == "Sunday"
    with pytest.raises(DataError, match=r"its answer has no number; that is 'It is a Sunday\.'"):
        judged(record, messages, ("number",))


def test_tasks_score_their_own_answers_and_are_the_same_again() -> None:
    spec = "chain_sum?size=5&seed=3&max_terms=2&max_digits=1"
    tasks = Tasks(spec)
    records = [tasks[i] for i in range(len(tasks))]
    assert len(records) == 5 and records == [Tasks(spec)[i] for i in range(5)]
    assert records != [Tasks(spec.replace("seed=3", "seed=4"))[i] for i in range(5)]
    for record in records:
        assert score(record["answer"], record) == 1
        assert score(str(int(record["answer"]) + 1), record) < 1


def test_an_answer_that_a_task_cannot_read_is_worth_0_and_told_of_once(caplog, monkeypatch) -> None:
    def scorer_of(task: str):
        return lambda answer, entry: 1.0 if answer == "2" else {}[f"{task} of {answer}"]

    monkeypatch.setattr(tasks, "_told", set())
    monkeypatch.setattr(tasks.package(), "get_score_answer_fn", scorer_of)
    with caplog.at_level(logging.WARNING, "erniekit"):
        found = [
            tasks.score(task, answer, {})
            for task, answer in (("boxnet", "x"), ("boxnet", "y"), ("boxnet", "2"), ("maze", "z"))
        ]
    assert found == [0, 0, 1, 0]
    told = [record.getMessage() for record in caplog.records]
    assert ["KeyError: 'boxnet of x'" in told[0], "KeyError: 'maze of z'" in told[1]] == [True] * 2
    assert len(told) == 2 and "boxnet" in told[0]


def test_a_function_of_the_user_is_called_with_record_and_answer(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def half(record, answer):\n    return len(answer) / record['size']\n")
    assert score("ab", {"answer": "", "size": 4}, reward=(f"{path}:half",)) == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "def f(record, answer):\n    return record['size']\n",
            "failed on a.jsonl:7: KeyError: 'size' (mine.py, line 2); it is called with a record",
        ),
        ("def f(answer):\n    return 1\n", "failed on a.jsonl:7: TypeError: f() takes 1 pos"),
        ("def f(record, answer)\n    return 1\n", "cannot be run: SyntaxError: expected ':'"),
        ("def f(record, answer):\n    return 'one'\n", "gave 'one' for an answer"),
        ("import nowhere_at_all\n", "cannot be run: ModuleNotFoundError: No module named"),
        ("def g(record, answer):\n    return 1\n", "mine.py has no function 'f'"),
    ],
)
def test_a_function_that_fails_is_told_of_with_its_place(text: str, told: str, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        score("1", {"answer": "1"}, reward=(f"{path}:f",))
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_of_a_record_that_is_none_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"reward regex failed on a.jsonl:7: .*unterminated"):
        score("1", {"answer": "1", "pattern": "("}, reward=("regex",))


def test_a_model_scores_dialogues_and_the_first_reward_says_what_is_right() -> None:
    policy = Policy(reward=("exact", "model"), reward_weights=(1.0, 0.5))
    rewards = Rewards(policy, lambda rows: [float(len(row)) for row in rows])
    found = rewards([{"answer": "a"}] * 2, ["a", "b"], [[5, 6, 7], [5, 6, 7, 8]], ["", ""])
    assert [(s.reward, s.is_right) for s in found] == [(2.5, True), (2.0, False)]


@pytest.mark.parametrize(
    ("settings", "record", "told"),
    [
        ({"reward": ("exakt",)}, {}, "reward='exakt' is not known; did you mean"),
        ({"reward": ("nowhere.py:f",)}, {}, "there is no file nowhere.py"),
        ({"reward": ("model",)}, {}, "needs reward_model"),
        ({"reward": ("format",)}, {}, "needs answer_pattern"),
        ({"answer_pattern": "("}, {}, "is not a regular expression"),
    ],
)
def test_what_cannot_score_is_refused_in_a_sentence(settings, record, told) -> None:
    with pytest.raises(ConfigError) as caught:
        score("1", record, **settings)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "record", "told"),
    [
        ("record", {"answer": "1"}, "it has reward=None"),
        ("record", {"answer": "1", "reward": "regex"}, "has no pattern"),
        ("regex", {"answer": "1"}, "has no pattern"),
        ("regex", {"answer": "1", "pattern": "("}, "its pattern is not a regular expression"),
        ("number", {"answer": "one"}, "its answer has no number; that is 'one'"),
        ("exact", {"answer": " "}, "its answer is empty"),
        ("reasoning_gym", {"answer": "1"}, "train_dataset_type: reasoning_gym"),
    ],
)
def test_a_record_that_no_rule_can_judge_is_told_of_before_it_is_asked(rule, record, told) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with pytest.raises(DataError) as caught:
        judged(record, messages, (rule,))
    assert told in str(caught.value)
    with pytest.raises(DataError, match=re.escape(told)):  # as one of several
        judged(record | {"entry": {}} if rule != "reasoning_gym" else record, messages,
               ("format", rule))  # fmt: skip


def test_tasks_that_are_not_there_are_refused() -> None:
    for spec, told in (
        ("chain_sun", "did you mean 'chain_sum'"),
        ("chain_sum?colour=1", "refuses these settings"),
        ("chain_sum?min_terms=5&max_terms=2", "refuses these settings"),
    ):
        with pytest.raises(ConfigError, match=told):
            Tasks(spec)
