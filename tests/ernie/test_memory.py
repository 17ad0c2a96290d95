"""Memory of large CPU tensors: blocks come back, hold what was written, and are never too many.

The allocator is the whole process's, so each case has a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from ernie.kernels.cpu.build import BuildError
from ernie.kernels.cpu.memory import told

try:
    told()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

PRELUDE = """
import random, threading
import torch
from ernie.kernels.cpu.memory import keep, told
older = torch.full((1 << 20,), 3.0)  # of torch's own allocator
keep()
"""


def run(body: str) -> None:
    code = PRELUDE + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_freed_block_is_given_out_again():
    run("""
        x = torch.ones(1 << 20)
        place = x.data_ptr()
        assert told() == (4 << 20, 0, 4 << 20)
        del x
        assert told() == (0, 4 << 20, 4 << 20)
        y = torch.empty((1 << 20) - 1000)  # a little smaller
        assert y.data_ptr() == place and told() == (4 << 20, 0, 4 << 20)
        """)


def test_a_block_that_is_far_too_large_makes_room_instead():
    run("""
        x = torch.ones(1 << 20)
        del x
        y = torch.ones(1 << 18)
        assert told() == (1 << 20, 0, 4 << 20)  # 4 MiB kept and 1 in use were one too many
        """)


def test_small_tensors_and_older_ones_are_torchs_own():
    run("""
        small = [torch.ones(100) for _ in range(1000)]
        assert older.sum() == 3 << 20
        del older
        assert told() == (0, 0, 0)
        """)


def test_random_lives_keep_their_values_and_the_bound():
    run("""
        rng, alive = random.Random(0), []
        for number in range(3000):
            if alive and rng.random() < 0.5:
                value, x = alive.pop(rng.randrange(len(alive)))
                assert bool((x == value).all())
                del x
            else:
                alive.append((number, torch.full((rng.randrange(1, 400_000),), float(number))))
            if len(alive) > 40:
                alive.pop(0)
            used, kept, most = told()
            assert used + kept <= most
        alive.clear()
        assert told().used == 0
        """)


def test_threads_do_not_share_a_block():
    run("""
        wrong = []
        def work(seed):
            rng = random.Random(seed)
            for _ in range(400):
                x = torch.full((rng.randrange(40_000, 60_000),), float(seed))
                wrong.extend([seed] * int((x != seed).any()))
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong and told().used == 0
        """)


def test_clones_resized_shared_and_borrowed_storages_work():
    run("""
        x = torch.arange(1 << 18, dtype=torch.float32)
        y = x.clone()
        y.resize_(1 << 19)
        assert bool((y[: 1 << 18] == x).all())
        z = x.clone()
        z.share_memory_()
        assert bool((z == x).all())
        w = torch.empty(0)
        w.set_(x.untyped_storage(), 0, (10,))
        numbers = x.numpy()
        del x
        assert w.tolist() == numbers[:10].tolist() == list(range(10))
        """)


def test_more_than_there_is_is_torchs_own_error():
    run("""
        try:
            torch.empty(1 << 60, dtype=torch.uint8)
        except RuntimeError as error:
            assert "memory" in str(error)
        else:
            raise AssertionError("allocated")
        """)
