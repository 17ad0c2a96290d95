"""The scheduler alone, with tokens made up: every request ends, whatever arrives and however little
room there is.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.engine.blocks import BlockManager
from fastdeploy.engine.request import Order, Request
from fastdeploy.engine.scheduler import Schedule, Scheduler
from fastdeploy.engine.speculative import num_allowed
from fastdeploy.sampling import SamplingParams

MAX_LEN, BLOCK_SIZE = 40, 4


def make(num_blocks: int = 30, **settings: object) -> Scheduler:
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 8} | settings
    return Scheduler(BlockManager(num_blocks, BLOCK_SIZE), **options)


def request(name: str, prompt: int | list[int], output: int = 4, **params: object) -> Request:
    ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    priority = params.pop("priority", 0)
    settings = SamplingParams(max_tokens=output, **params)
    order = Order(seed=0, priority=priority)
    return Request(name, ids, settings, order, max_model_len=MAX_LEN)


def step(
    scheduler: Scheduler, guesses: random.Random | None = None
) -> tuple[Schedule, list[Request]]:
    """One step; `guesses` decides how many drafts are accepted, and how many come next."""
    schedule = scheduler.schedule()
    tokens = []
    for part in schedule.parts:
        accepted = guesses.randint(0, len(part.draft_ids)) if guesses else 0
        if part.chooses:
            tokens.append([*part.draft_ids[:accepted], 7])
    grown = scheduler.update(schedule, tokens)
    for one, _ in grown if guesses else ():
        most = num_allowed(one, 5)
        one.draft_ids = [guesses.randint(0, 9) for _ in range(guesses.randint(0, max(0, most)))]
    scheduler.check()
    return schedule, [one for one, _ in grown]


arrivals = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 10), st.integers(0, 6), st.integers(-1, 1)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(
    arrivals=arrivals,
    num_blocks=st.integers(10, 16),
    budget=st.integers(3, 20),
    abort_every=st.integers(2, 9),
    seed=st.none() | st.integers(0, 99),
    num_ahead=st.sampled_from([0, 2, 4]),
)
def test_every_request_ends_and_gives_everything_back(
    arrivals: list[tuple[int, int, int, int]],
    num_blocks: int,
    budget: int,
    abort_every: int,
    seed: int | None,
    num_ahead: int,
) -> None:
    scheduler = make(num_blocks, max_num_batched_tokens=budget, num_ahead=num_ahead)
    guesses = None if seed is None else random.Random(seed)
    expected = {}
    pending = []
    for i, (prompt, output, at, priority) in enumerate(sorted(arrivals, key=lambda a: a[2])):
        one = request(str(i), prompt, output, priority=priority)
        expected[one.id] = one
        pending.append((at, one))
    aborted = set()
    for now in range(1000):
        while pending and pending[0][0] <= now:
            scheduler.add(pending.pop(0)[1])
        if now % abort_every == abort_every - 1 and scheduler.running:
            victim = scheduler.running[now % len(scheduler.running)]
            scheduler.finish(victim)
            aborted.add(victim.id)
        if not (scheduler.waiting or scheduler.running):
            if not pending:
                break
            continue
        schedule, _ = step(scheduler, guesses)
        assert schedule.parts, f"nothing to do in step {now}, but work is left"
        assert schedule.num_tokens <= budget, f"{schedule.num_tokens} tokens in a step"
    for one in expected.values():
        made = f"{one.id} made {one.num_output} of {one.max_output} tokens"
        assert one.id in aborted or one.num_output == one.max_output, made
    assert scheduler.blocks.num_in_use == 0


def test_a_long_prompt_does_not_stall_a_running_text() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request("stream", 2, output=10))
    step(scheduler)
    scheduler.add(request("long", 30))
    tokens = []
    for _ in range(5):
        schedule, grown = step(scheduler)
        assert "stream" in [one.id for one in grown]
        tokens.append({part.request.id: part.num_tokens for part in schedule.parts})
    assert tokens[0] == {"stream": 1, "long": 7}, tokens


def test_a_scored_prompt_in_front_leaves_a_token_for_the_text_behind(monkeypatch) -> None:
    monkeypatch.setattr("fastdeploy.engine.scheduler.MAX_SCORED_TOKENS", 3)
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(request("scored", 30, prompt_logprobs=0))
    scheduler.add(request("stream", [50], output=20))
    for _ in range(8):
        schedule, grown = step(scheduler)
        assert [part.num_tokens for part in schedule.parts] == [3, 1]
        assert [one.id for one in grown] == ["stream"]


def test_requests_are_admitted_first_come_first_served() -> None:
    scheduler = make(num_blocks=10, max_num_batched_tokens=100)
    for name, length in (("a", 20), ("big", list(range(50, 82))), ("small", [90])):
        scheduler.add(request(name, length))
    schedule, _ = step(scheduler)
    assert [part.request.id for part in schedule.parts] == ["a"], "small must not overtake big"


def test_the_newest_is_preempted_goes_to_the_head_and_keeps_its_tokens() -> None:
    scheduler = make(num_blocks=10, max_num_batched_tokens=100, max_num_seqs=2)
    old, new = request("old", 15, output=20), request("new", [60 + i for i in range(15)], output=20)
    for one in (old, new):
        scheduler.add(one)
    scheduler.add(request("later", [99]))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.waiting[0] is new
    assert new.num_computed == 0 and new.num_output > 0 and not new.table.blocks
    known = list(new.token_ids)
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert new.token_ids[: len(known)] == known
    assert new.num_output == old.num_output == 20


def test_a_finished_request_frees_its_blocks_in_the_same_step() -> None:
    scheduler = make()
    scheduler.add(request("one", 5, output=1))
    step(scheduler)
    assert scheduler.blocks.num_in_use == 0 and not scheduler.running


def test_prompt_scores_limit_the_part_and_skip_the_cache() -> None:
    scheduler = make(num_blocks=100, max_num_batched_tokens=1000)
    scheduler.add(request("first", 30))
    step(scheduler)
    scheduler.add(request("scored", 30, prompt_logprobs=1))
    schedule = scheduler.schedule()
    part = schedule.parts[-1]
    assert (part.start, part.num_tokens, part.num_logits) == (0, 30, 30)


def test_scored_prompts_share_the_logits_of_a_step(monkeypatch) -> None:
    monkeypatch.setattr("fastdeploy.engine.scheduler.MAX_SCORED_TOKENS", 8)
    monkeypatch.setattr("fastdeploy.engine.scheduler.MAX_SCORED_IN_STEP", 20)
    scheduler = make(num_blocks=100, max_num_seqs=6, max_num_batched_tokens=1000)
    for name in "abcde":
        scheduler.add(request(name, 30, prompt_logprobs=0))
    scheduler.add(request("plain", 30))
    ended: set[str] = set()
    for number in range(60):
        schedule, _ = step(scheduler)
        assert len(schedule.parts) == 6 or number, "the last one waits for those before it"
        scored = [part for part in schedule.parts if part.request.id != "plain"]
        assert max((part.num_logits for part in scored), default=0) <= 8
        # Those that run go on by a token each, whatever the others take.
        assert sum(part.num_logits for part in scored) <= 20 + len(scored), number
        ended |= {part.request.id for part in schedule.parts if part.request.finish_reason()}
        if not scheduler.has_work:
            break
    assert ended == {*"abcde", "plain"}


def test_a_request_that_had_to_wait_is_not_remembered_for_ever() -> None:
    scheduler = make(num_blocks=10, max_num_batched_tokens=100)
    for name, length in (("a", 20), ("big", list(range(50, 82)))):
        scheduler.add(request(name, length))
    step(scheduler)
    assert scheduler.refused is not None and scheduler.refused[0].id == "big"
    scheduler.finish(scheduler.refused[0])
    assert scheduler.refused is None
    scheduler.add(request("again", list(range(50, 82))))
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.refused is None


def test_lower_priorities_are_admitted_first_and_equal_ones_as_they_came() -> None:
    scheduler = make(max_num_seqs=1, max_num_batched_tokens=100)
    for i, priority in enumerate([0, 1, 0, -2, 1, -2]):
        scheduler.add(request(f"{i}", [i], output=1, priority=priority))
    order = []
    while scheduler.waiting:
        order += [one.id for one in step(scheduler)[1]]
    assert order == ["3", "5", "0", "2", "1", "4"]


def test_the_lowest_priority_is_preempted_though_it_was_admitted_first() -> None:
    scheduler = make(num_blocks=10, max_num_batched_tokens=100)
    low = request("low", [60 + i for i in range(11)], output=20, priority=5)
    scheduler.add(low)
    step(scheduler)
    urgent = [request(f"{i}", [70 * i + j for j in range(7)], output=20) for i in range(2)]
    for one in urgent:
        scheduler.add(one)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert list(scheduler.waiting) == [low] and scheduler.running == urgent
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert low.num_output == 20


def test_a_waiting_request_does_not_push_a_running_one_out() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("first", [1], output=5))
    step(scheduler)
    scheduler.add(request("urgent", [2], output=5, priority=-9))
    assert [one.id for one in step(scheduler)[1]] == ["first"]


def test_all_that_were_preempted_go_on_in_their_order() -> None:
    scheduler = make(num_blocks=20, max_num_batched_tokens=100)
    requests = [request(f"{i}", [60 * i + j for j in range(9)], output=6) for i in range(4)]
    for one in requests:
        scheduler.add(one)
    step(scheduler)
    scheduler.preempt_all()
    scheduler.check()
    assert list(scheduler.waiting) == requests and scheduler.blocks.num_in_use == 0
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert [one.num_output for one in requests] == [6] * 4


def test_drafts_take_what_is_left_and_give_it_back() -> None:
    scheduler = make(num_blocks=20, max_num_batched_tokens=8, num_ahead=3)
    one, other = request("one", 4, output=20), request("other", [50, 51, 52], output=20)
    for text in (one, other):
        scheduler.add(text)
    step(scheduler)
    for text in (one, other):
        text.draft_ids = [1, 2, 3, 4]
    schedule = scheduler.schedule()
    # 8 tokens: one known each, then drafts from the first on. Room is made for 3 tokens more.
    assert [part.num_tokens for part in schedule.parts] == [5, 3]
    assert [part.num_logits for part in schedule.parts] == [5, 3]
    assert [part.token_ids for part in schedule.parts] == [[7, 1, 2, 3, 4], [7, 1, 2]]
    assert [len(text.table.blocks) for text in (one, other)] == [3, 3]
    grown = scheduler.update(schedule, [[1, 9], [8]])
    assert grown == [(one, 2), (other, 1)]
    assert (one.token_ids[4:], one.num_computed) == ([7, 1, 9], 6)
    assert (other.token_ids[3:], other.num_computed) == ([7, 8], 4)
    scheduler.schedule()
    assert [text.table.num_named for text in (one, other)] == [1, 1]
    assert scheduler.num_draft_tokens == 6 and scheduler.num_accepted_tokens == 1


def test_no_token_follows_one_that_ends_the_text() -> None:
    scheduler = make(num_blocks=20, max_num_batched_tokens=8)
    one = request("one", 4, output=20, stop_token_ids=[2])
    scheduler.add(one)
    step(scheduler)
    one.draft_ids = [1, 2, 3]
    schedule = scheduler.schedule()
    assert scheduler.update(schedule, [[1, 2, 3, 4]]) == [(one, 2)]
    assert one.token_ids[4:] == [7, 1, 2] and one.finish_reason() == "stop"
    assert scheduler.blocks.num_in_use == 0


def test_a_draft_is_not_found_before_it_is_accepted() -> None:
    scheduler = make(num_blocks=20, max_num_batched_tokens=20)
    one = request("one", 4, output=20)
    scheduler.add(one)
    step(scheduler)
    one.draft_ids = [1, 2, 3]
    schedule = scheduler.schedule()
    text = [*one.token_ids, 1, 2, 3, 9]
    assert len(scheduler.blocks.find(text).blocks) == 1
    scheduler.update(schedule, [[1, 2, 3, 9]])
    assert len(scheduler.blocks.find(text).blocks) == 2
