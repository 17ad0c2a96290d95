"""`erniekit server` and `erniekit chat`: a fastdeploy server as a process, and a client of it.

Nothing of fastdeploy is imported; both sides only share the OpenAI API.
"""

from __future__ import annotations

import io
import logging
import shlex
import signal
import subprocess
import sys
from typing import Any

from ernie.settings import ConfigError
from erniekit.config import Generation, Run

log = logging.getLogger("erniekit")


def run_server(run: Run) -> int:
    """Serve until Ctrl-C or SIGTERM, which end the child too; returns the child's exit status."""
    command = server_command(run)
    log.info("%s", shlex.join(command))
    child = subprocess.Popen(command)
    # Ctrl-C reaches the child by itself (same terminal); a polite kill is passed on.
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 130 if child.wait() else 0
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.kill()
            child.wait()


def server_command(run: Run) -> list[str]:
    s = run.server
    return [
        sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server",
        "--model", served_model(run),
        "--host", s.host, "--port", str(s.port),
        "--max-model-len", str(s.max_model_len), "--max-num-seqs", str(s.max_num_seqs),
        "--gpu-memory-utilization", str(s.gpu_memory_utilization),
        "--block-size", str(s.block_size),
    ]  # fmt: skip


def served_model(run: Run) -> str:
    """The merged export, the final model or the newest checkpoint of output_dir, else the model.

    `use_checkpoint` comes first. Raises ConfigError for an adapter: a server cannot load one, so it
    must be merged first.
    """
    from erniekit import checkpoint

    if run.training.output_dir is None:
        return run.model.model_name_or_path
    export, output, which = run.output / "export", run.output, run.training.use_checkpoint
    if which is None and (export / "config.json").is_file():
        return str(export)
    folder = checkpoint.chosen(output, which)
    if folder is not None and (folder / "adapter_config.json").is_file():
        words = ["erniekit", "export", "model_name_or_path=BASE", f"output_dir={output}"]
        words += [f"use_checkpoint={which}"] if which else []
        raise ConfigError(
            f"{folder} holds a LoRA adapter, which cannot be served by itself; merge it first: "
            + shlex.join(words)
            + ("; then leave use_checkpoint out" if which else "")
        )
    if folder is None and not run.model.model_name_or_path:
        raise ConfigError(f"{output} holds no model and model_name_or_path is not set; give one")
    return str(folder or run.model.model_name_or_path)


def run_chat(run: Run) -> int:
    """A dialogue in the terminal; returns the exit code.

    What the server refuses, or does not end, is told in a line; the dialogue goes on without it.
    """
    try:
        import openai
    except ImportError:
        raise ConfigError(
            "chat needs the openai package: pip install 'ernie-open[serve]'"
        ) from None

    address = f"http://{run.server.host}:{run.server.port}/v1"
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    print(f"talking to {address}; `clear` forgets the dialogue, `exit` ends", flush=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # told below, in place of a lost line
    history: list[dict[str, str]] = []
    while True:
        try:
            question = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if question == "exit":
            return 0
        if question == "clear":
            history.clear()
        elif any("\ud800" <= character <= "\udfff" for character in question):
            print("not sent, for it is not UTF-8 text; write it as UTF-8", file=sys.stderr)
        elif question:
            asked = {"role": "user", "content": question}
            try:
                answer = _ask(client, [*history, asked], run.generation, address)
            except _NoAnswer as error:
                print(error, file=sys.stderr)
                continue
            # Only the answer is remembered: thoughts are not part of the dialogue.
            history += [asked, {"role": "assistant", "content": answer}]


class _NoAnswer(Exception):
    """A server that is there has refused, or has broken off; the message is a line."""


def _ask(client: Any, history: list[dict[str, str]], g: Generation, address: str) -> str:
    import httpx
    import openai

    extra = {
        "min_tokens": g.min_tokens,
        "repetition_penalty": g.repetition_penalty,
        "chat_template_kwargs": {"enable_thinking": g.enable_thinking},
    }
    if not g.enable_thinking:
        del extra["chat_template_kwargs"]
    try:
        stream = client.chat.completions.create(
            model="default",
            messages=history,
            temperature=g.temperature,
            top_p=g.top_p,
            max_tokens=g.max_new_tokens,
            frequency_penalty=g.frequency_penalty,
            presence_penalty=g.presence_penalty,
            stream=True,
            extra_body=extra,
        )
    except openai.APIConnectionError:
        raise ConfigError(f"no server answers at {address}; start one: erniekit server") from None
    except openai.APIStatusError as error:
        raise _NoAnswer(f"the server refused: {_message_of(error)}") from None
    try:
        return _shown(stream, at_once=g.stream)
    except (openai.APIConnectionError, httpx.HTTPError) as error:
        reason = str(error) or type(error).__name__
        raise _NoAnswer(f"\nthe server broke off ({reason}); ask again when it is back") from None
    except openai.APIError as error:
        raise _NoAnswer(f"\nthe server broke off: {_message_of(error)}") from None


def _message_of(error: Any) -> str:
    """What the server itself says in an error, in a line."""
    body = error.body
    told = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(told or error.message).split())


def _shown(stream: Any, *, at_once: bool) -> str:
    """Print an answer, thoughts first, as it comes or when it is whole; returns the answer."""
    answer, is_thinking = [], False
    for event in stream:
        if not event.choices:
            continue
        delta = event.choices[0].delta
        thought = getattr(delta, "reasoning_content", None)  # not a field of the OpenAI API
        if thought and not is_thinking:
            print("thinking: ", end="")
            is_thinking = True
        if delta.content and is_thinking:
            print("\nanswer: ", end="")
            is_thinking = False
        if delta.content:
            answer.append(delta.content)
        if at_once:
            print(thought or delta.content or "", end="", flush=True)
    print("" if at_once else "".join(answer))
    return "".join(answer)
