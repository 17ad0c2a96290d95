"""A rank above 0: a child process that holds its slice of the model and computes what it is sent.

Started by `fastdeploy.engine.ranks`, which describes the frames. It has no schedule, no sampler and
no text; it ends when rank 0 closes the socket or is gone, whatever the reason.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors import SafetensorError

from ernie.adapters import Adapter
from ernie.model import Embeds, ErnieModel
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import Batch
from fastdeploy.engine.cache import KVCache, cache_dtype, free_bytes
from fastdeploy.engine.frames import unpacked, unpacked_adapter
from fastdeploy.engine.loading import choose_kernels, read_model, reread_model
from fastdeploy.engine.ranks import Group
from fastdeploy.engine.runner import Runner
from fastdeploy.engine.weights import HostCopy, without_weights


class RankWorker:
    """The public methods are what rank 0 may call, with arguments and results that fit in JSON."""

    def __init__(self, model: ErnieModel, config: EngineConfig, group: Group) -> None:
        self._model, self._config, self._group = _reader(model), config, group
        self._runner: Runner | None = None
        self._host_copy: HostCopy | None = None
        self._adapter_by_serial: dict[int, Adapter] = {}
        self._data = b""  # for the next call

    def free_bytes(self) -> int:
        return free_bytes(self._model.device)

    def allocate(self, num_blocks: int, block_size: int, dtype: str, drafting_layers: int) -> None:
        """Make room for this rank's share of the cache; what was cached before is dropped."""
        model = self._model
        self._runner = None
        cache = KVCache.allocate(
            model.config,
            num_blocks,
            block_size,
            cache_dtype(dtype, model),
            model.device,
            drafting_layers=drafting_layers,
            num_ranks=self._group.size,
        )
        self._runner = Runner(model, cache, None)

    def sleep(self, level: int) -> None:
        """What `Engine.sleep` does here."""
        self._runner = None
        if level == 2:
            self._model, self._host_copy = without_weights(self._model), None
        elif self._model.device.type == "cuda" and self._host_copy is None:
            self._host_copy = HostCopy(self._model)
        if self._group.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """Take the weights back that level 1 keeps in the host's memory; `allocate` comes next."""
        if self._host_copy is not None:
            self._host_copy.restore()
            self._host_copy = None

    def update_weights(self, folder: str) -> None:
        """Go on with this rank's slice of other weights, which rank 0 has found to be right."""
        network, group = self._model.config, self._group
        self._model = _reader(
            reread_model(folder, self._config, network, group.device, group.shard)
        )
        self._host_copy = None
        if self._runner is not None:
            self._runner.model = self._model

    def load_adapter(self, serial: int, rank: int) -> str | None:
        """Hold this rank's slice of an adapter, the data that came before; or say why not."""
        num_layers = self._model.config.num_hidden_layers
        try:
            adapter = unpacked_adapter(self._data, num_layers, rank, serial)
            self._adapter_by_serial[serial] = adapter.to(self._group.device)
        except (
            SafetensorError,
            MemoryError,
            RuntimeError,
        ) as error:  # the last: torch's, of memory
            return str(error)
        finally:
            self._data = b""
        return None

    def unload_adapters(self, serials: list[int]) -> None:
        for serial in serials:
            self._adapter_by_serial.pop(serial, None)

    def _obey(self, frame: bytes) -> Any:
        """Do what one frame says; returns the answer to a call."""
        kind, content = frame[:1], frame[1:]
        if kind == b"b":
            assert self._runner is not None, "a batch before there is a cache"
            batch = unpacked(content, self._adapter_by_serial).to(self._model.device)
            self._runner.compute(self._with_rows(batch))
            return None
        if kind == b"d":
            self._data = content
            return None
        call = json.loads(content)
        assert not call["name"].startswith("_"), f"{call['name']} is not to be called"
        return {"value": getattr(self, call["name"])(**call["arguments"])}

    def _with_rows(self, batch: Batch) -> Batch:
        """The batch with its rows of pictures, which rank 0 sends through the group."""
        if batch.embeds is None:
            return batch
        model, places_L = self._model, batch.embeds.places_L
        rows_LD = torch.empty(
            len(places_L),
            model.config.hidden_size,
            dtype=model.activation_dtype,
            device=model.device,
        )
        return replace(batch, embeds=Embeds(self._group.receive(rows_LD), places_L))


def _reader(model: ErnieModel) -> ErnieModel:
    """Without tower and resampler: rank 0 sees pictures for all."""
    model.vision_model = model.model.resampler_model = None
    return model


def main(link: Connection) -> None:
    try:
        settings = json.loads(link.recv_bytes())
    except EOFError:
        return
    folder = settings["folder"]
    arguments = (settings["parent"], folder)
    threading.Thread(target=_end_with, args=arguments, daemon=True).start()
    logging.disable(logging.WARNING)  # rank 0 reads the same files and says the same
    torch.set_num_threads(settings["num_threads"])
    try:
        _serve(link, settings)
    finally:
        _forget(folder)


def _serve(link: Connection, settings: dict[str, Any]) -> None:
    config = EngineConfig(**settings["config"])
    device = torch.device(settings["device"])
    group = Group(settings["rank"], config.tensor_parallel_size, device, settings["folder"])
    try:
        choose_kernels(config, device)
        model = read_model(config, device, group.shard)
    except ValueError as error:  # of the folder; rank 0 has most likely met it as well
        _answer(link, {"error": str(error)})
        sys.exit(1)
    _answer(link, {"value": None})
    group.connect()
    worker = RankWorker(model, config, group)
    while True:
        try:
            frame = link.recv_bytes()
        except EOFError:
            return
        if (answer := worker._obey(frame)) is not None:
            _answer(link, answer)


def _answer(link: Connection, answer: dict[str, Any]) -> None:
    link.send_bytes(json.dumps(answer).encode())


def _end_with(parent: int, folder: str) -> None:
    """A thread: ends this process soon after rank 0, in whatever wait it is."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _forget(folder)
    os._exit(1)


def _forget(folder: str) -> None:
    """Remove where the ranks meet, which nobody does without this one: a killed rank 0 cannot."""
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
