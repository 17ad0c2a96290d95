"""The command line: `fastdeploy serve --model PATH`, every flag a field of the two config classes.

Imports no torch and no web library, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from ernie.settings import did_you_mean
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.flags import help_text, read_config, read_flags

KINDS = [EngineConfig, ServerConfig]
# Name -> where it is, and what it does.
COMMANDS = {
    "serve": ("", "an OpenAI-compatible server: fastdeploy serve --model PATH"),
    "chat": ("terminal:chat", "a conversation with a server, in the terminal"),
    "complete": ("terminal:complete", "a text continued by a server"),
    "run-batch": ("batch:main", "a file of requests answered: run-batch -i in.jsonl -o out.jsonl"),
    "bench": ("bench:main", "how fast it is: bench serve, bench latency, bench throughput"),
    "tokenizer": ("facts:tokenizer", "a text to token ids, or back"),
    "collect-env": ("facts:collect_env", "this machine and its packages, for a report"),
}
USAGE = "usage: fastdeploy COMMAND ...; each has its own --help\n\ncommands:\n" + "".join(
    f"  {name:<12} {text}\n" for name, (_, text) in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "serve":
        return serve(words[1:], program="fastdeploy serve")
    if words and words[0] in COMMANDS:
        return client(words[0], words[1:])
    if words in (["version"], ["--version"]):
        sys.stdout.write(f"fastdeploy {version()}\n")
        return 0
    asked = words in ([], ["--help"], ["-h"], ["help"])
    if not asked:
        suggestion = did_you_mean(words[0], [*COMMANDS, "help"])
        sys.stderr.write(f"fastdeploy: unknown command {words[0]!r}{suggestion}\n")
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2


def version() -> str:
    """Of this project, as installed."""
    try:
        return metadata.version("ernie-open")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def client(name: str, argv: Sequence[str]) -> int:
    """Run one of the other commands; 2 and one sentence for whatever the user can set right."""
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(import_module(f"fastdeploy.client.{module}"), function)(argv)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if type(error) is ValueError:
            raise  # a defect of ours, as in `serve`
        sys.stderr.write(f"fastdeploy {name}: {error}\n")
    return 2


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
        message = (
            f"the server needs {error.name}; install the extra: pip install 'ernie-open[serve]'"
        )
    except ValueError as error:
        if type(error) is ValueError:
            raise  # what a user can cause has a class of its own: this is a defect of ours
        message = str(error)
    sys.stderr.write(f"{program}: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
