"""The command line: what the system refuses, a dialogue with a server that fails, ways to start."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from erniekit.cli import main
from tests.helpers_faults import forked_runs


def refused(number: int, path: str | None = "some/file") -> OSError:
    return OSError(number, os.strerror(number), *([path] if path else []))


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (refused(errno.EACCES), 2, "some/file: Permission denied; change its permissions, or"),
        (refused(errno.EROFS), 2, "some/file: Read-only file system; give a path on a disk that"),
        (refused(errno.ENOENT), 2, "some/file: No such file or directory; give a path that exists"),
        (refused(errno.ELOOP), 2, "give another path"),
        (refused(errno.ENOSPC), 3, "some/file: No space left on device; make room and start again"),
        (refused(errno.EDQUOT, None), 3, "; make room and start again"),
        (refused(errno.EACCES, None), 2, ": Permission denied; change its permissions"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_sentence(error, status, told, monkeypatch, capsys) -> None:
    def run(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("erniekit.convert.run_quantize", run)
    assert main(["quantize", "a", "b"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("erniekit quantize: ") and told in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError("no number"), refused(errno.ENOTCONN, None), refused(errno.EBADF, None)]
)
def test_errors_that_are_no_matter_of_files_keep_their_traceback(error, monkeypatch) -> None:
    def run(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("erniekit.convert.run_quantize", run)
    with pytest.raises(OSError) as raised:
        main(["quantize", "a", "b"])
    assert raised.value is error


def test_a_full_disk_ends_every_verb_with_3(tiny, tmp_path: Path) -> None:
    model = str(tiny("tiny-dense"))
    with forked_runs() as runs:
        for name, words in {
            "quantize": [model, str(tmp_path / "q")],
            "merge": [model, model, str(tmp_path / "m")],
            "export-gguf": [model, str(tmp_path / "x.gguf")],
        }.items():
            ended = runs.run([name, *words], tmp_path, at=3, fault="full")
            assert ended.status == 3 and "Traceback" not in ended.told, ended.told
            assert "No space left on device; make room and start again" in ended.told
