"""`fastdeploy chat` and `fastdeploy complete`: a running server in the terminal.

Ctrl-C ends the answer that is being written, and with it its work on the server; at the prompt it
ends the program.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, option, required
from fastdeploy.client.command import read
from fastdeploy.client.http import Client, ServerError

HELP = """  /system TEXT   sets the system prompt; without a text it is removed
  /reset         forgets the conversation
  /save FILE     writes it as JSON, as the API takes it
  /help          these lines          /exit, Ctrl-D   the end
"""
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass(frozen=True, kw_only=True, slots=True)
class Talking:
    """A server, and how it is to answer."""

    base_url: str = option("http://127.0.0.1:8000", "Address of the server.")
    api_key: str | None = option(None, "Key; none: FD_API_KEY of the environment.")
    model: str | None = option(None, "Name in requests; none: the first that the server lists.")
    temperature: float | None = option(None, "Sampling temperature; none: the server's.")
    top_p: float | None = option(None, "Nucleus sampling; none: the server's.")
    max_tokens: int | None = option(None, "Tokens of an answer at most.")
    seed: int | None = option(None, "Seed of the answers.")

    def body(self, model: str) -> dict[str, Any]:
        names = ("temperature", "top_p", "max_tokens", "seed")
        values = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in values.items() if value is not None}
        return {"model": model, "stream": True, **given}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chatting:
    """The conversation."""

    system: str | None = option(None, "System prompt.")
    message: str | None = option(None, "Ask this, print the answer, and end.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completing:
    """The text."""

    prompt: str = required("Text to continue; - reads it from the standard input.")


def chat(argv: Sequence[str]) -> int:
    about = "A conversation with a running server."
    talking, chatting = read(argv, [Talking, Chatting], "fastdeploy chat", about)
    with asyncio.Runner() as runner:
        client = Client(talking.base_url, talking.api_key)
        talk = Conversation(runner, client, talking, chatting.system)
        if chatting.message is not None:
            talk.ask(chatting.message)
            return 0
        sys.stdout.write(f"{talk.model} at {client.name}; /help lists the commands\n")
        while (line := _line("> ")) is not None:
            if not talk.obey(line):
                break
    return 0


def complete(argv: Sequence[str]) -> int:
    about = "A text continued by a running server."
    talking, completing = read(argv, [Talking, Completing], "fastdeploy complete", about)
    prompt = sys.stdin.read() if completing.prompt == "-" else completing.prompt
    with asyncio.Runner() as runner:
        client = Client(talking.base_url, talking.api_key)
        model = talking.model or runner.run(client.model())
        body = talking.body(model) | {"prompt": prompt}
        _run(runner, show(client, "/v1/completions", body, []))
    return 0


class Conversation:
    """Its messages so far, and what a line of the reader does to them."""

    def __init__(
        self, runner: asyncio.Runner, client: Client, talking: Talking, system: str | None
    ) -> None:
        self.runner, self.client, self.talking = runner, client, talking
        self.model = talking.model or runner.run(client.model())
        self.system = system
        self.messages: list[dict[str, str]] = []

    @property
    def history(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def obey(self, line: str) -> bool:
        """Do what a line says; False to end."""
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        try:
            if command == "/reset":
                self.messages.clear()
            elif command == "/system":
                self.system = rest.strip() or None
            elif command == "/save":
                self.save(rest.strip())
            elif command.startswith("/"):
                sys.stdout.write(HELP)
            elif line.strip():
                self.ask(line)
        except (ServerError, ConfigError) as error:
            sys.stderr.write(f"{error}\n")
        return True

    def ask(self, text: str) -> None:
        """One question and its answer, of which a part is kept if it was interrupted.

        Raises ServerError, and then the question is forgotten.
        """
        body = self.talking.body(self.model)
        body["messages"] = [*self.history, {"role": "user", "content": text}]
        parts: list[str] = []
        _run(self.runner, show(self.client, "/v1/chat/completions", body, parts))
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "".join(parts)},
        ]

    def save(self, path: str) -> None:
        if not path:
            raise ConfigError("/save needs the name of a file: /save FILE")
        text = json.dumps({"messages": self.history}, ensure_ascii=False, indent=1)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None
        sys.stdout.write(f"{Path(path).resolve()}: {len(self.history)} messages\n")


async def show(client: Client, path: str, body: dict[str, Any], parts: list[str]) -> None:
    """Write an answer as it comes, thoughts dimmed, and collect it in `parts`.

    Raises ServerError.
    """
    is_thinking = False
    async with aclosing(client.stream(path, body)) as events:
        async for _, event in events:
            if not event.get("choices"):
                continue
            choice = event["choices"][0]
            delta = choice.get("delta", choice)
            if thought := delta.get("reasoning_content"):
                _write(("" if is_thinking else _dimmed(True)) + _plain(thought))
                is_thinking = True
            if text := delta.get("content") or delta.get("text"):
                if is_thinking:
                    _write(_dimmed(False) + "\n\n")
                    is_thinking = False
                parts.append(text)
                _write(_plain(text))
            for call in delta.get("tool_calls") or []:
                asked = call.get("function", {})
                name = f"\n[tool call] {asked['name']} " if asked.get("name") else ""
                _write(name + _plain(asked.get("arguments") or ""))
    _write(f"{_dimmed(False) if is_thinking else ''}\n")


def _run(runner: asyncio.Runner, work: Any) -> None:
    try:
        runner.run(work)
    except KeyboardInterrupt:
        _write(f"{_dimmed(False)}\n")


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        return None


def _dimmed(begins: bool) -> str:
    return (DIM if begins else PLAIN) if sys.stdout.isatty() else ""


def _plain(text: str) -> str:
    """Without control characters, which could steer the reader's terminal."""
    if not sys.stdout.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
