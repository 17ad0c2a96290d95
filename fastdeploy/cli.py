"""The command line: `fastdeploy serve --model PATH`, every flag a field of the two config classes.

Imports no torch and no web library, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ernie.settings import ConfigError, add_flags, did_you_mean, field_types, read_yaml
from fastdeploy.config import LATER, NEVER, EngineConfig, ServerConfig, read_config

KINDS = [EngineConfig, ServerConfig]
USAGE = """usage: fastdeploy COMMAND ...

commands:
  serve    an OpenAI-compatible server: fastdeploy serve --model PATH; see fastdeploy serve --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "serve":
        return serve(words[1:], program="fastdeploy serve")
    asked = words in ([], ["--help"], ["-h"], ["help"])
    if not asked:
        suggestion = did_you_mean(words[0], ["serve", "help"])
        sys.stderr.write(f"fastdeploy: unknown command {words[0]!r}{suggestion}\n")
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2


def serve(argv: Sequence[str], program: str) -> int:
    """Run the server; 2 and one sentence for whatever the user can set right."""
    try:
        engine_config, server_config = read_config(KINDS, read_flags(argv, program), "the flags")
        from fastdeploy.server import app

        return app.serve(engine_config, server_config)
    except KeyboardInterrupt:
        return 130  # as shells say it; while the model was loading, or the server starting
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        message = f"the server needs {error.name}; install the extra: pip install ernie-open[serve]"
    except ValueError as error:
        if type(error) is ValueError:
            raise  # what a user can cause has a class of its own: this is a defect of ours
        message = str(error)
    sys.stderr.write(f"{program}: {message}\n")
    return 2


def read_flags(argv: Sequence[str], program: str) -> dict[str, Any]:
    """Flat values: the environment's key, then `--config` files, then flags, later ones winning.

    Raises ConfigError for a flag that is unknown or given twice.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="An OpenAI-compatible server for one model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="YAML file with flags, keys written with underscores.")
    for kind in KINDS:
        add_flags(parser, kind)
    argv = [re.sub("^-tp(?==|$)", "--tensor-parallel-size", word) for word in argv]
    known, rest = parser.parse_known_args(argv)
    given = vars(known) | _later_flags(rest)
    _refuse_repeated(argv)
    values: dict[str, Any] = {}
    if os.environ.get("FD_API_KEY"):
        values["api_key"] = os.environ["FD_API_KEY"]
    if "config" in given:
        values |= read_yaml(given.pop("config"))
    return values | given


def _later_flags(words: Sequence[str]) -> dict[str, Any]:
    """Flags of FastDeploy that argparse does not know; `read_config` judges their values."""
    values: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("-"):
            raise ConfigError(f"{word!r} belongs to no flag; write --flag value")
        if name not in LATER and name not in NEVER:
            known = [key for kind in KINDS for key in field_types(kind)] + list(LATER)
            raise ConfigError(f"unknown flag {flag!r}{_as_flag(did_you_mean(name, known))}")
        if equals:
            values[name] = value
        elif remaining and not remaining[0].startswith("--"):
            values[name] = remaining.pop(0)
        else:
            values[name] = True
    return values


def _as_flag(suggestion: str) -> str:
    return suggestion.replace("_", "-").replace("'", "'--", 1)


def _refuse_repeated(argv: Sequence[str]) -> None:
    flags = [w.partition("=")[0].replace("_", "-") for w in argv if w.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ConfigError(f"{flag} is given twice; give it once, lists separated by commas")


if __name__ == "__main__":
    sys.exit(main())
