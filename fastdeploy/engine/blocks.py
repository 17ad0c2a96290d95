"""Who owns which block of the paged cache, and which blocks hold the beginning of a known text.

The cache is a pool of blocks of `block_size` positions. A request's table lists its blocks in order
of position; several requests may have the same block in their tables. A block is always in exactly
one of these states:

    in use    some tables list it            num_users > 0
    cached    nobody uses it, but its keys and values are those of a known text: it can be found
              and used again, until its place is needed
    empty     nobody uses it and nothing can be found in it

Cached and empty blocks together are the *free queue*, in order of eviction: the least recently used
first. There is nothing else: no timestamps, no tree, no second pool.

How a full block is found again. A text is a chain of blocks, so a block is known by its parent and
its own tokens. Everything that is ever cached gets a serial number, its *content*, and one dict
maps

    (content of the parent, the block's token ids)  ->  block

The dict hashes the key and then compares it, so two texts whose hashes collide cannot be mixed up;
and as a content number is given out once, a parent's number stands for the whole text before it.
Where the cache also holds what a layer made of each token *and the next one* (an MTP block), the
key has the token after the block too, and a block is named once that is known.

Texts with a *salt* hang under a root of their own, a number made from the salt by a cryptographic
hash: who does not know the salt can neither find such blocks nor learn, by timing, that they exist.
Nothing is kept for a salt but the blocks themselves. Texts of an adapter have other keys and values
than those of the model: each adapter in memory has roots of its own, too. The tokens of a picture
are all alike, so a key has a number made from the picture's pixels in the place of each.

Integers only: the tensors are in `cache.py`, the policy is in `scheduler.py`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NO_PARENT = 0  # content number of the text before the first block
Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class Block:
    num_users: int = 0
    content: int = NO_PARENT  # what a child names as its parent, while `key` is set
    key: Key | None = None  # under which the block is found, None when it is not


@dataclass(slots=True)
class Table:
    """The blocks of one request, in order of position, and how far they have been made findable."""

    blocks: list[int] = field(default_factory=list)
    num_named: int = 0  # full blocks whose content is known to the manager, from the first on
    content: int = NO_PARENT  # of the last of them


class BlockManager:
    """Hands out, shares, names, evicts and takes back blocks.

    Raises nothing for lack of room: `grow` and `adopt` say what they need, and the caller asks
    `num_free` first.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, caching: bool = True, reads_next: bool = False
    ) -> None:
        """`reads_next`: what is cached for a token depends on the next token too."""
        self.block_size = block_size
        self.num_key_tokens = block_size + reads_next
        self.caching = caching
        self.blocks = [Block() for _ in range(num_blocks)]
        # An ordered dict as a queue from which the middle can be taken: keys only.
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.block_by_key: dict[Key, int] = {}
        self.num_contents = NO_PARENT

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_in_use(self) -> int:
        return len(self.blocks) - len(self.free)

    def num_missing(self, table: Table, num_tokens: int) -> int:
        """Blocks that `table` lacks to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(table.blocks))

    def find(self, token_ids: Sequence[int], root: int = NO_PARENT) -> Table:
        """The longest run of blocks under `root` that hold the beginning of `token_ids`, as a table
        of its own.

        The last token is never part of it: somebody wants the logits after it, so it has to be
        computed. Nothing is taken yet; see `adopt`.
        """
        found = Table(content=root)
        if not self.caching:
            return found
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            tokens = tuple(token_ids[start : start + self.num_key_tokens])
            block = self.block_by_key.get((found.content, tokens))
            if block is None:
                break
            found.blocks.append(block)
            found.content = self.blocks[block].content
        found.num_named = len(found.blocks)
        return found

    def num_free_without(self, found: Table) -> int:
        """Free blocks that remain once those of `found` are in use."""
        return len(self.free) - sum(self.blocks[i].num_users == 0 for i in found.blocks)

    def adopt(self, found: Table) -> None:
        """Use the blocks of `found`, which `find` has just returned."""
        for i in found.blocks:
            if self.blocks[i].num_users == 0:
                del self.free[i]
            self.blocks[i].num_users += 1

    def grow(self, table: Table, num_tokens: int) -> list[int]:
        """Make room for `num_tokens` tokens in all; returns the blocks that were added."""
        added = [self._take() for _ in range(self.num_missing(table, num_tokens))]
        table.blocks += added
        return added

    def name(self, table: Table, token_ids: Sequence[int], num_tokens: int) -> None:
        """Make the blocks findable that the first `num_tokens` of `token_ids` fill.

        May be called when the step that computes them is merely decided: within a step every layer
        writes all new keys before any query reads, so even a request of the same step may use them.
        """
        if not self.caching:
            return
        num_extra = self.num_key_tokens - self.block_size
        num_tokens = min(num_tokens, len(token_ids) - num_extra)
        for i in range(table.num_named, num_tokens // self.block_size):
            start = i * self.block_size
            tokens = tuple(token_ids[start : start + self.num_key_tokens])
            key = (table.content, tokens)
            known = self.block_by_key.get(key)
            if known is None:
                # The same text may have been computed twice side by side: the first keeps the name.
                known = table.blocks[i]
                self.num_contents += 1
                self.block_by_key[key] = known
                self.blocks[known].key, self.blocks[known].content = key, self.num_contents
            table.content = self.blocks[known].content
            table.num_named = i + 1

    def shrink(self, table: Table, num_tokens: int) -> None:
        """Take back the blocks past those that hold `num_tokens` tokens; none of them has a
        name.
        """
        while len(table.blocks) > -(-num_tokens // self.block_size):
            i = table.blocks.pop()
            self.blocks[i].num_users -= 1
            assert self.blocks[i].num_users == 0 and self.blocks[i].key is None, self.blocks[i]
            self.free[i] = None
            self.free.move_to_end(i, last=False)  # empty: the first to be handed out

    def release(self, table: Table) -> None:
        """Give all blocks of `table` back and empty it.

        The last block goes first to the queue: the end of a text is of use to fewer than its
        beginning, and a child that outlived its parent could not be found any more.
        """
        for i in reversed(table.blocks):
            block = self.blocks[i]
            block.num_users -= 1
            if block.num_users == 0:
                self.free[i] = None
                if block.key is None:
                    self.free.move_to_end(i, last=False)  # empty: the first to be handed out
        table.blocks, table.num_named, table.content = [], 0, NO_PARENT

    def forget(self) -> None:
        """Make every block unfindable, those in use too; their users keep them."""
        for i in self.block_by_key.values():
            self.blocks[i].key = None
        self.block_by_key.clear()

    def _take(self) -> int:
        """The block that was not used for the longest time; what was cached in it is forgotten."""
        i, _ = self.free.popitem(last=False)
        block = self.blocks[i]
        if block.key is not None:
            del self.block_by_key[block.key]
            block.key = None
        block.num_users = 1
        return i

    def check(self, tables: Sequence[Table]) -> None:
        """Assert that the books agree with `tables`, which must be all tables there are."""
        listed = [0] * len(self.blocks)
        for table in tables:
            assert len(set(table.blocks)) == len(table.blocks), f"a block twice in {table}"
            assert table.num_named <= len(table.blocks), table
            for i in table.blocks:
                listed[i] += 1
        for i, block in enumerate(self.blocks):
            assert block.num_users == listed[i], f"block {i}: {block}, in {listed[i]} tables"
            assert (i in self.free) == (listed[i] == 0), f"block {i}: {block}, free or in use?"
            assert block.key is None or self.block_by_key[block.key] == i, f"block {i}: {block}"
        for key, i in self.block_by_key.items():
            assert self.blocks[i].key == key, f"{key} leads to block {i}: {self.blocks[i]}"
            assert len(key[1]) == self.num_key_tokens, key


def root_of(salt: str | None, adapter: int = 0) -> int:
    """The content number under which texts of a salt and an adapter (its serial number, 0 for
    none) begin; negative, where no block's is. An empty salt is none for an adapter."""
    if salt is None and not adapter:
        return NO_PARENT
    data, owner = (salt or "").encode("utf-8", "surrogatepass"), adapter.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=16, person=owner).digest()
    return -1 - int.from_bytes(digest, "little")
