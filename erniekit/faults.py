"""When the machine runs out of something: one sentence and an exit status instead of a traceback.

Out of memory (GPU, or allocations that a limit on the process refuses) names the changes that take
less, from `erniekit.plan_report`; a full disk names the folder. Both end with exit status 3, and
checkpoints that are whole stay so. Linux kills a process over its last memory page without asking,
which no program can turn into a sentence. Any other file that the system refuses to read or write
is named with its reason.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ernie.settings import ConfigError, as_word
from erniekit.checkpoint import DiskFull, checkpoints
from erniekit.config import Run, resolved

# What torch's allocators say; only that of CUDA has a class of its own.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAMELESS = (*_FULL, errno.EACCES, errno.EROFS, errno.EIO)  # of files, named or not
# What helps where the system refuses a file, by the number of its error.
_HELP = {
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path on a disk that can be written",
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "give a path whose folders are folders",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the disk may be broken; give a path on another",
}


class OutOfMemory(ValueError):
    """A step or the model did not fit."""

    exit_status = 3


def told_in_a_sentence(work: Callable[[], int], run: Run, device: str) -> int:
    """What `work()` returns; memory or disk that runs out raises OutOfMemory or DiskFull."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0] if str(error) else "an allocation failed"
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(
            f"the disk of {run.output} is full ({error.filename or 'while writing'}); checkpoints "
            f"that were whole still are: make room, and {run.way_on} goes on from the last"
        ) from None
    # Out of the handler, so that the frames of the step, and their tensors, are gone by now.
    raise OutOfMemory(f"out of memory ({what}); {_advice(run, device)}{_last_checkpoint(run)}")


def of_system(error: OSError) -> ConfigError | None:
    """The sentence for a file that the system refuses to read or write; None for what is no matter
    of files: a defect, or an error that other packages have made one of the system's.
    """
    if error.errno is None or (error.filename is None and error.errno not in _NAMELESS):
        return None
    # Some calls name a file by its number, and some messages are not the system's.
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    reason = error.strerror or os.strerror(error.errno)
    if error.errno in _FULL:
        return DiskFull(f"{where}{reason}; make room and start again")
    return ConfigError(f"{where}{reason}; {_HELP.get(error.errno, 'give another path')}")


def is_out_of_memory(error: BaseException) -> bool:
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(words in told for words in _OUT_OF_MEMORY)


def _advice(run: Run, device: str) -> str:
    from erniekit.fit import fitted, memory_for
    from erniekit.plan import GIB, Degrees, plan
    from erniekit.plan_report import changes_that_fit

    try:
        run = fitted(resolved(run, device), device, Degrees())
        found = plan(run, device)
        limit = min(memory_for(run, device), int(0.9 * found.peak))
        changes = changes_that_fit(run, device, Degrees(), limit)
    except ConfigError as error:
        return f"no plan can be made of this run ({error})"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "too little is left even to plan a smaller run: see erniekit plan"
    told = f"planned are {found.peak / GIB:.2f} GiB"
    if not changes:
        return f"{told} and no two settings take a tenth less: take a larger machine"
    less = (
        f"{' '.join(f'{k}={as_word(v)}' for k, v in change.settings.items())} "
        f"({change.plan.peak / GIB:.2f} GiB; {change.cost})"
        for change in changes
    )
    return f"{told}; less takes: {', or '.join(less)}"


def _last_checkpoint(run: Run) -> str:
    found = checkpoints(run.output)
    return f"; {run.way_on} goes on from {found[-1][1]}" if found else ""
