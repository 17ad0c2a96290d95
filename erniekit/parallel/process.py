"""The process of a rank that `erniekit.launch` starts: `erniekit`, and a note of how it ended.

torch's agent does not tell how ranks ended where a signal has ended the agent itself. So each of
them leaves its exit status in a folder of the agent's; one that a signal has ended leaves none.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

FOLDER_VARIABLE = "ERNIEKIT_EXIT_STATUSES"


def status_of_all(folder: Path, number: signal.Signals, num_ranks: int) -> int:
    """The exit status of a run whose agent got a signal, from those that its ranks have left.

    A lack or a mistake comes first, then a rank that the signal ended before it could save.
    """
    found = [int(path.read_text(encoding="utf-8")) for path in folder.iterdir() if path.is_file()]
    for status in (3, 2):
        if status in found:
            return status
    if len(found) < num_ranks:
        return 128 + number
    return max(found)


def main() -> None:
    from erniekit import cli

    status = 1
    try:
        status = cli.main(sys.argv[1:])
    finally:
        folder = Path(os.environ[FOLDER_VARIABLE])
        if folder.is_dir():  # the agent may be gone
            (folder / os.environ["RANK"]).write_text(str(status), encoding="utf-8")
    sys.exit(status)


if __name__ == "__main__":
    main()
