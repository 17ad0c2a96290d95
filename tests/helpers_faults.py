"""Runs of `erniekit` that are killed, or find the disk full, at a chosen file operation.

Every write, flush, rename and removal below the output folder is counted, in whatever thread. At
the wanted one the process is killed by SIGKILL, or the operation fails with ENOSPC; a write has put
half of its bytes down by then. Processes are forked from one that has imported everything, so that
a run takes a fraction of a second.

    python tests/helpers_faults.py      a line of JSON in, one out, for each run
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit status (negative: the signal), operations counted, what it said."""

    status: int
    operations: int
    told: str


class Runs:
    """A process that forks one run after the other."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, words: list[str], output: Path, *, at: float = 0, fault: str = "kill") -> Ended:
        """`erniekit <words>`; at operation `at` (0: never) comes the fault, "kill" or "full"; the
        fault "term" is a SIGTERM after `at` seconds.
        """
        assert self.process.stdin and self.process.stdout
        order = {"words": words, "output": str(output), "at": at, "fault": fault}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def forked_runs() -> Iterator[Runs]:
    runs = Runs()
    try:
        yield runs
    finally:
        runs.close()


# Runs the real command, but dies by SIGKILL when `erniekit.<module>.<function>` is called for the
# given time: in the middle of a step, of a save, of a log record.
KILLER = """
import os, signal, sys, importlib
module, function, when = sys.argv[1:4]
home = importlib.import_module(module)
for part in function.split(".")[:-1]:
    home = getattr(home, part)
name, calls = function.split(".")[-1], 0
real = getattr(home, name)
def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(home, name, deadly)
from erniekit.cli import main
sys.exit(main(sys.argv[4:]))
"""


def killed(module: str, function: str, when: int, arguments: list[str]) -> None:
    command = [sys.executable, "-c", KILLER, module, function, str(when), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


# --- in the process that forks ---


class Counter:
    """Counts operations below `folder`; the one numbered `at` ends as `fault` says."""

    def __init__(self, folder: str, at: float, fault: str, note: Path) -> None:
        self.folder, self.at, self.fault, self.note = folder, at, fault, note
        self.count = 0

    def is_here(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def come(self, half: Any = None) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if half is not None:
            half()
        if self.fault == "kill":
            self.note.write_text(str(self.count))
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        real_open = io.open

        def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = real_open(path, mode, *rest, **options)
            is_written = set(mode) & set("wax+")
            return Counted(file, self) if is_written and self.is_here(path) else file

        builtins.open = io.open = opened  # type: ignore[assignment]
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, real: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            is_ours = name == "fsync" or options.get("dir_fd") or self.is_here(arguments[0])
            # Making room does not fail on a full disk, nor does making a folder that is there.
            is_free = name in ("unlink", "rmdir") or (name == "mkdir" and exists(arguments[0]))
            if is_ours and not (self.fault == "full" and is_free):
                self.come()
            return real(*arguments, **options)

        return called


class Counted:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, counter: Counter) -> None:
        self.file, self.counter = file, counter

    def write(self, data: Any) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.counter.come(half)
        return self.file.write(data)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _child(order: dict[str, Any], log: Path, count: Path) -> None:
    from erniekit.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    counter = Counter(order["output"], order["at"], order["fault"], count)
    counter.install()
    if order["fault"] == "term":
        counter.at = 0
        threading.Timer(order["at"], os.kill, (os.getpid(), signal.SIGTERM)).start()
    status = main(order["words"])
    count.write_text(str(counter.count))
    os._exit(status)


def main() -> None:
    import tempfile

    # What every run imports; torch does the first on its first backward pass.
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    import erniekit.recipes.sft  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        log, count = Path(name) / "log", Path(name) / "count"
        for line in sys.stdin:
            count.write_text("0")
            child = os.fork()
            if not child:
                try:
                    _child(json.loads(line), log, count)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(99)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            told = log.read_text(encoding="utf-8", errors="replace")
            ended = {"status": status, "operations": int(count.read_text()), "told": told}
            print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
