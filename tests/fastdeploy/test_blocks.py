"""The block manager: whatever is done to it, its books agree and no text is mixed up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastdeploy.engine.blocks import BlockManager, Table, root_of

NUM_BLOCKS, BLOCK_SIZE = 9, 3


class Walk(RuleBasedStateMachine):
    """Texts over three letters come, grow and go; `contents` plays the part of the tensors.

    A third of the texts has no salt, the others one of two; a block remembers its text's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.texts: list[tuple[Table, list[int], str | None]] = []
        # Salt and whole text up to a block's end.
        self.contents: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    def compute(self, table: Table, tokens: list[int], salt: str | None) -> None:
        for i, block in enumerate(table.blocks):
            self.contents[block] = salt, tuple(tokens[: (i + 1) * BLOCK_SIZE])

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        salt=st.sampled_from([None, "a", "b"]),
    )
    def admit(self, tokens: list[int], salt: str | None) -> None:
        found = self.manager.find(tokens, root_of(salt))
        assert len(found.blocks) * BLOCK_SIZE < len(tokens), "the last token must be computed"
        for i, block in enumerate(found.blocks):
            text = tuple(tokens[: (i + 1) * BLOCK_SIZE])
            assert self.contents[block] == (salt, text), "a wrong hit"
        missing = self.manager.num_missing(found, len(tokens))
        if missing > self.manager.num_free_without(found):
            return
        self.manager.adopt(found)
        assert len(self.manager.grow(found, len(tokens))) == missing
        self.compute(found, tokens, salt)
        self.manager.name(found, tokens, len(tokens))
        self.texts.append((found, tokens, salt))

    @rule(which=st.integers(0, 99), more=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def grow(self, which: int, more: list[int]) -> None:
        if not self.texts:
            return
        table, tokens, salt = self.texts[which % len(self.texts)]
        if self.manager.num_missing(table, len(tokens) + len(more)) > self.manager.num_free:
            return
        tokens += more
        self.manager.grow(table, len(tokens))
        self.compute(table, tokens, salt)
        self.manager.name(table, tokens, len(tokens))

    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        if self.texts:
            table, _, _ = self.texts.pop(which % len(self.texts))
            self.manager.release(table)
            assert not table.blocks

    @rule()
    def forget(self) -> None:
        """What was computed before is wrong from now on, for those who come."""
        self.manager.forget()
        self.contents = dict.fromkeys(self.contents, (None, (-1,)))

    @invariant()
    def books_agree(self) -> None:
        self.manager.check([table for table, _, _ in self.texts])


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def held(manager: BlockManager, tokens: list[int], salt: str | None = None) -> Table:
    """A table that holds `tokens`, computed and named."""
    table = manager.find(tokens, root_of(salt))
    manager.adopt(table)
    manager.grow(table, len(tokens))
    manager.name(table, tokens, len(tokens))
    return table


@given(st.integers(1, 25))
def test_a_text_that_was_released_is_found_but_for_its_last_token(length: int) -> None:
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    tokens = list(range(length))
    first = held(manager, tokens)
    blocks = first.blocks
    manager.release(first)
    found = manager.find(tokens)
    assert found.blocks == blocks[: (length - 1) // BLOCK_SIZE]


def test_the_least_recently_used_text_is_evicted_first_and_from_its_end() -> None:
    manager = BlockManager(6, 2)
    old, new = [1, 1, 2, 2, 3, 3, 9], [4, 4, 5]
    for text in (old, new):
        manager.release(held(manager, text))
    # Two blocks of these texts are not full, so four are cached and two empty.
    taken = held(manager, [7, 7, 8, 8, 6, 6])
    assert len(manager.find(old).blocks) == 2, "the end of the old text goes first"
    assert len(manager.find(new).blocks) == 1
    manager.check([taken])


def test_texts_with_equal_hashes_are_not_mixed_up() -> None:
    class Same(int):
        def __hash__(self) -> int:
            return 7

    manager = BlockManager(8, 2)
    texts = [[Same(i), Same(i + 1), Same(0)] for i in range(3)]
    for text in texts:
        manager.release(held(manager, text))
    first_blocks = [manager.find(text).blocks for text in texts]
    assert len({tuple(blocks) for blocks in first_blocks}) == 3, first_blocks
    assert manager.find([Same(9), Same(9), Same(0)]).blocks == []


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    manager = BlockManager(8, 2)
    manager.release(held(manager, [1, 1, 5, 5, 0]))
    assert len(manager.find([1, 1, 5, 5, 0]).blocks) == 2
    assert manager.find([2, 2, 5, 5, 0]).blocks == []
    assert manager.find([5, 5, 0]).blocks == []


def test_two_texts_computed_side_by_side_share_their_continuation() -> None:
    """Both computed the same first block before either knew; what follows is found from either."""
    manager = BlockManager(8, 2)
    tables = []
    for _ in range(2):
        table = Table()
        manager.grow(table, 2)
        tables.append(table)
    for table in tables:
        manager.name(table, [1, 1], 2)
    manager.grow(tables[1], 4)
    manager.name(tables[1], [1, 1, 2, 2], 4)
    assert manager.find([1, 1, 2, 2, 3]).blocks == [tables[0].blocks[0], tables[1].blocks[1]]
    manager.check(tables)


def test_without_caching_nothing_is_found() -> None:
    manager = BlockManager(8, 2, caching=False)
    manager.release(held(manager, [1, 1, 2, 2, 3]))
    assert manager.find([1, 1, 2, 2, 3]).blocks == []


def test_texts_of_one_salt_are_found_under_no_other() -> None:
    manager = BlockManager(20, 2)
    text, salts = [1, 1, 2, 2, 3], (None, "a", "b", "")
    tables = {salt: held(manager, text, salt) for salt in salts}
    for salt in salts:
        assert manager.find(text, root_of(salt)).blocks == tables[salt].blocks[:2], repr(salt)
    assert manager.find(text, root_of("c")).blocks == []
    assert len({block for table in tables.values() for block in table.blocks}) == 4 * 3


def test_a_thousand_salts_leave_nothing_behind_but_blocks() -> None:
    manager = BlockManager(6, 2)
    for i in range(1000):
        manager.release(held(manager, [1, 1, 2, 2, 3], f"tenant {i}"))
    assert len(manager.block_by_key) <= 6
    manager.check([])
    known = {name: getattr(manager, name) for name in vars(manager)}
    sizes = {name: len(value) for name, value in known.items() if hasattr(value, "__len__")}
    assert max(sizes.values()) <= 6, sizes


def test_what_is_forgotten_is_not_found_and_its_continuation_neither() -> None:
    manager = BlockManager(8, 2)
    manager.release(held(manager, [1, 1, 2, 2, 3]))
    running = held(manager, [4, 4, 5, 5])
    manager.forget()
    manager.grow(running, 6)
    manager.name(running, [4, 4, 5, 5, 6, 6], 6)
    for text in ([1, 1, 2, 2, 3], [4, 4, 5, 5, 6, 6, 0]):
        assert manager.find(text).blocks == [], text
    manager.check([running])
