"""What the client commands share: their flags, which are the fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ernie.settings import add_flags, fill


def read(
    argv: Sequence[str],
    kinds: list[type],
    program: str,
    about: str,
    short: Mapping[str, str] | None = None,
) -> list[Any]:
    """An instance of each of `kinds` from flags; `short` maps short flags to long ones.

    Raises ConfigError for wrong values, and SystemExit as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for kind in kinds:
        add_flags(parser, kind)
    words = [(short or {}).get(word, word) for word in argv]
    return fill(kinds, vars(parser.parse_args(words)), "the flags")
