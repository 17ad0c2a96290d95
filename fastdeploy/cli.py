"""The command line: `fastdeploy serve --model PATH`, every flag a field of the two config classes.

Imports no torch and no web library, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ernie.settings import did_you_mean
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.flags import help_text, read_config, read_flags

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
    if "--help" in argv or "-h" in argv:
        usage = f"{program} MODEL [--flag value ...]"
        sys.stdout.write(help_text(usage, "An OpenAI-compatible server for one model.", KINDS))
        return 0
    try:
        engine_config, server_config = read_config(KINDS, read_flags(argv, KINDS), "the flags")
        from fastdeploy.server import listener

        return listener.serve(engine_config, server_config)
    except KeyboardInterrupt:
        return 130  # as shells say it; while the model was loading, or the server starting
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in (
            "fastapi",
            "uvicorn",
            "prometheus_client",
            "msgspec",
        ):
            raise
        message = f"the server needs {error.name}; install the extra: pip install ernie-open[serve]"
    except ValueError as error:
        if type(error) is ValueError:
            raise  # what a user can cause has a class of its own: this is a defect of ours
        message = str(error)
    sys.stderr.write(f"{program}: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
