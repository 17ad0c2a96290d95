"""Where the answers of a round come from: our own batched generator, or a running server.

A sampler is called with the policy as it stands, on all ranks at once, and gives token ids with
log-probabilities to its rank's prompts; an answer depends on its prompt, its seed and the weights,
not on its neighbours.

    Own       `ernie.rollout`. Of LoRA the base is brought into the inference form once and the
              adapters are laid beside it in every round; a Full model, and adapters of other
              forms or beside a base in few bits, generate as they are.
    Served    a fastdeploy server with --enable-control-api and --enable-logprob: pause, new weights
              from a folder that it must be able to read, resume; then one request an answer. Its
              arithmetic is not that of training: see `rollout_correction`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

import ernie
from ernie.adapter_files import read_adapter
from ernie.adapters import Adapter
from ernie.chat import stop_ids
from ernie.checkpoint.writer import write_file
from ernie.fused import fuse
from ernie.model import ErnieModel
from ernie.rollout import Answer, Sampling, rollout
from ernie.settings import ConfigError
from erniekit import lora, lora_files
from erniekit.build import lora_of, read_model
from erniekit.config import Run
from erniekit.parallel.ranks import ALONE, Ranks

WEIGHTS_FOLDER = "rollout_weights"
COMPLETIONS = "/v1/completions"
TIMEOUT_S = 600.0
# After a lost connection control can be asked again. Answers are not: a server that has begun anew
# would give those of the weights it was started with.
RETRY_S = (0.5, 2.0)
# Said, for a server takes what is not said from the model's generation_config.json.
NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Sampler(Protocol):
    """Answers to each prompt, one for each of its seeds."""

    def __call__(
        self,
        model: ErnieModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Answer]]: ...


class Own:
    """Our own generator."""

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.device = run, device
        self.base: ErnieModel | None = None

    def __call__(
        self,
        model: ErnieModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Answer]]:
        assert model.tokenizer is not None
        adapter = None
        stops = sorted(stop_ids(model.tokenizer))
        if self.run.generates_apart and has_adapters(model):  # not so of a merged one
            if self.base is None:
                self.base = fuse(read_model(self.run, self.device))
            adapter, model = self._adapter(model), self.base
        most = self.run.policy.rollout_max_seqs
        return rollout(
            model, prompts, seeds, sampling, stop_ids=stops, max_seqs=most, adapter=adapter
        )

    def _adapter(self, model: ErnieModel) -> Adapter | None:
        """The pairs as they are, as the base takes them; None while they change nothing."""
        if not any(bool(pair.lora_B.any()) for _, pair, _ in lora.pairs(model)):
            return None
        with tempfile.TemporaryDirectory() as folder:
            _write_adapter(self.run, model, Path(folder))
            rank = lora_of(self.run).rank
            return read_adapter(folder, model.config, max_rank=rank, device=model.device)


def _write_adapter(run: Run, model: ErnieModel, folder: Path) -> None:
    write_file(folder / lora_files.ADAPTER_FILE, lora_files.adapter_tensors(model))
    text = lora_files.adapter_config(model, lora_of(run), run.model.model_name_or_path)
    (folder / lora_files.ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def has_adapters(model: ErnieModel) -> bool:
    return any(True for _ in lora.pairs(model))


class Served:
    """A server that answers with the weights it was given last."""

    def __init__(self, run: Run, device: str, ranks: Ranks = ALONE) -> None:
        assert run.policy.rollout_server is not None
        self.run, self.device, self.ranks = run, device, ranks
        self.address = run.policy.rollout_server.rstrip("/").removesuffix("/v1")
        self.folder = (run.output / WEIGHTS_FOLDER).resolve()

    def __call__(
        self,
        model: ErnieModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Answer]]:
        assert model.tokenizer is not None
        if self.ranks.is_first:
            self.update(model)
        self.ranks.barrier()
        stops = sorted(stop_ids(model.tokenizer))
        jobs = [
            {
                "model": "default",
                "prompt": list(prompt),
                "seed": seed % 2**31,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                **({"top_k": sampling.top_k} if sampling.top_k else {}),
                **NO_PENALTIES,
                "stop_token_ids": stops,
                "logprobs": 0,
                "return_token_ids": True,
            }
            for prompt, own in zip(prompts, seeds, strict=True)
            for seed in own
        ]
        with ThreadPoolExecutor(self.run.policy.rollout_max_seqs) as pool:
            found = iter(list(pool.map(self._answer, jobs)))
        return [[next(found) for _ in own] for own in seeds]

    def update(self, model: ErnieModel) -> None:
        """Give the server the policy's weights, adapters merged. Whatever fails, it is told to go
        on, for others may ask it too, and no folder of weights is left.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            ernie.save(merged(model, self.device), self.folder)
            with self._paused():
                self._post("/v1/update_weights", {"path": str(self.folder)})
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        try:
            self._post("/v1/pause")
            yield
        except BaseException:
            with contextlib.suppress(ConfigError):  # the first error is the one that tells
                self._post("/v1/resume")
            raise
        self._post("/v1/resume")

    def _answer(self, job: dict[str, Any]) -> Answer:
        answer = self._post(COMPLETIONS, job)
        try:
            [choice] = answer["choices"]
            ids = [int(i) for i in choice["completion_token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"rollout_server {self.address} answered without token ids and log-probabilities "
                f"({error!r}); it must be a fastdeploy server of this version"
            ) from None
        if len(ids) != len(log_probs) or not ids:
            raise ConfigError(
                f"rollout_server {self.address} gave {len(ids)} tokens and {len(log_probs)} "
                "log-probabilities; it must give one for each token"
            )
        return Answer(ids, log_probs, is_cut=choice["finish_reason"] == "length")

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else b""
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}, method="POST"
        )
        if key := os.environ.get("FD_API_KEY") or os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key.split(',')[0]}")
        waits = iter(() if path == COMPLETIONS else RETRY_S)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                told = error.read().decode("utf-8", "replace")[:300]
                hint = ""
                if error.code == 404 and "/v1/" in path and "completions" not in path:
                    hint = "; start it with --enable-control-api"
                if error.code == 401:
                    hint = "; give one of its keys in FD_API_KEY (else OPENAI_API_KEY is sent)"
                raise ConfigError(
                    f"rollout_server {self.address}{path} refused ({error.code}): {told}{hint}"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                wait = None if isinstance(cause, TimeoutError) else next(waits, None)
                if wait is None:
                    raise ConfigError(
                        f"no server answers at rollout_server={self.address} ({error}); start "
                        "one: fastdeploy serve FOLDER --enable-control-api --enable-logprob"
                    ) from None
                time.sleep(wait)
            except ValueError:
                raise ConfigError(
                    f"rollout_server {self.address}{path} answered what is not JSON; it must be a "
                    "fastdeploy server"
                ) from None


@torch.no_grad()
def merged(model: ErnieModel, device: str) -> ErnieModel:
    """The policy as a plain model in bfloat16 (routers float32), of memory of its own: what its
    weights in few bits stand for, with the adapters merged.
    """
    plain = ErnieModel(model.config, device=device)
    lora.merge_from(plain, model)
    plain.tokenizer, plain.layout = model.tokenizer, model.layout
    plain.generation_config = model.generation_config
    return plain
