"""Log-probabilities of the reference model: computed once, before training, and kept on disk.

    output_dir/reference_log_probs.jsonl
        {"model": ..., "device": ..., ...}                  what they were computed with
        {"pair": "5f0c...", "log_probs": [-41.3, -57.9]}    chosen, rejected; one line a pair

The reference is the base model of the run (`build.read_model`), for LoRA and Full alike, and as in
ERNIEKit without the adapter of `lora_path`. It is gone before training begins: no second model is
held. A pair is known by its tokens (`PairSample.key`), so a file serves every run in its folder.
Numbers are written with all digits: a resumed run reads the very same ones.

With `ref_model_update_steps` the model becomes its own reference every so many steps: it is then
asked about the pairs of the steps up to the next time, those after the end of the run too, so that
still no second model is held and the run can be made longer. Those numbers are part of a
checkpoint's state, and not of the file; a run that goes on with more or other pairs is refused
until the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie.checkpoint.hub import resolve
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit import checkpoint
from erniekit.build import choose_products, read_model
from erniekit.config import Run
from erniekit.data.batch import Batch
from erniekit.device_batch import Judged, Pairs, to_device
from erniekit.preference import sequence_log_probs

log = logging.getLogger("erniekit")

REFERENCE_FILE = "reference_log_probs.jsonl"
_EVERY_S = 10.0  # between two lines that tell how far it is
_ENDS = 1 << 16  # bytes at both ends of a weight file by which it is known


def reference_of(references: References | None, batch: Pairs | Judged) -> Tensor:
    """Log-probabilities of the reference, as `References.of`; zero for every answer without one."""
    if references is not None:
        return references.of(batch)
    device = batch.token_ids_T.device
    return torch.zeros(len(batch.keys), 2, dtype=torch.float64, device=device)


def next_move(every: int, step: int) -> int:
    """The first step, this one or a later one, after which a reference moves; it never does after
    none.
    """
    return max(math.ceil(step / every), 1) * every


class References:
    """The log-probabilities of pairs by key, for a run on a device; none before `fill`.

    With `is_kept` new ones are added to the file; only the holder of the folder may do that.
    `log_probs(model, batch, chunk_size=)` gives two for each of a batch's keys, `(P, 2)`.
    """

    def __init__(
        self,
        run: Run,
        device: str,
        *,
        is_kept: bool,
        log_probs: Callable[..., Tensor] = sequence_log_probs,
    ) -> None:
        self.run, self.device, self.is_kept, self.log_probs = run, device, is_kept, log_probs
        self.every = max(run.preferences.ref_model_update_steps, 0)  # steps; 0: it never moves
        self.is_moved = False
        self.path = run.output / REFERENCE_FILE
        self.values: dict[bytes, tuple[float, float]] = {}

    def of(self, batch: Pairs | Judged) -> Tensor:
        """Of the pairs of a batch, float64 `(P, 2)`, on its device."""
        values = [self.values[key] for key in batch.keys]
        return torch.tensor(values, dtype=torch.float64, device=batch.token_ids_T.device)

    def move(self, model: ErnieModel, batches: Iterable[Batch]) -> None:
        """Make the model, as it is now, the reference of these batches, and forget all others."""
        self.values, self.is_moved = {}, True
        for batch in batches:
            self.values |= self._asked(model, batch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of a reference that has moved; {} before."""
        return {k.hex(): v for k, v in self.values.items()} if self.is_moved else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; nothing for {}."""
        if state:
            self.is_moved = True
            self.values = {bytes.fromhex(key): (c, r) for key, (c, r) in state.items()}

    def lacks(self, batches: Iterable[Batch]) -> bool:
        """Whether any key of these batches is unknown."""
        return any(key not in self.values for batch in batches for key in batch.keys)

    @torch.no_grad()
    def _asked(self, model: ErnieModel, batch: Batch) -> dict[bytes, tuple[float, float]]:
        chunk_size = self.run.model.loss_subbatch_seqlen
        found = self.log_probs(model, to_device(batch, model.device), chunk_size=chunk_size)
        return {key: (c, r) for key, (c, r) in zip(batch.keys, found.tolist())}

    def fill(self, batches: Iterable[Batch]) -> None:
        """Read the file, and compute what it lacks of these batches.

        A pair is computed in the first row that has it, so that what comes out does not depend on
        where an earlier start was cut off. The model is read only if something is missing.
        """
        if self.run.model.lora_path:
            log.info(
                "the reference is %s without the adapter of lora_path, from which training starts",
                self.run.model.model_name_or_path,
            )
        self._read()
        model: ErnieModel | None = None
        start = told = time.monotonic()
        num_new = 0
        for batch in batches:
            missing = [key for key in batch.keys if key not in self.values]
            if not missing:
                continue
            if model is None:
                log.info("computing the log-probabilities of the reference model")
                choose_products(self.run, self.device)
                model = read_model(self.run, self.device)
            found = self._asked(model, batch)
            self._add({key: found[key] for key in dict.fromkeys(missing)})
            num_new += len(missing)
            if time.monotonic() - told > _EVERY_S:
                told = time.monotonic()
                log.info("reference: %d pairs, %.0f s", num_new, told - start)
        if num_new:
            log.info("reference: %d pairs in %.1f s", num_new, time.monotonic() - start)

    def _add(self, found: dict[bytes, tuple[float, float]]) -> None:
        self.values |= found
        if self.is_kept:
            lines = [
                json.dumps({"pair": key.hex(), "log_probs": pair}) + "\n"
                for key, pair in found.items()
            ]
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:
                raise ConfigError(
                    f"{self.path} cannot be written ({error.strerror}); make room and start again: "
                    "what is there is kept"
                ) from None

    def _read(self) -> None:
        """Take over what the file has, if it is of this model; start it anew otherwise."""
        origin = _origin(self.run, self.device)
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        head, *lines = text.splitlines() or [""]
        before = _parsed(head)
        if changed := [k for k, v in origin.items() if before and before.get(k) != v]:
            what = " and ".join(changed)
            log.warning("%s is of another %s; it is not used", self.path, what)
        if before == origin:
            self.values = dict(filter(None, map(_pair, lines)))
        if self.is_kept:  # anew, since a killed run may have left half a line
            entries = [{"pair": k.hex(), "log_probs": v} for k, v in self.values.items()]
            whole = "".join(json.dumps(entry) + "\n" for entry in [origin, *entries])
            if whole != text:
                checkpoint.replace_text(self.path, whole)


def _origin(run: Run, device: str) -> dict[str, Any]:
    """What the numbers depend on besides the pairs."""
    model = run.model
    seed = None if model.continue_training else run.training.seed
    small: dict[str, Any] = {}
    if model.compute_type != "bf16":  # the reference is the model in few bits, as training begins
        keys = ["compute_type", "qlora_weight_double_quant", "pissa"]
        keys += ["lora_rank", "lora_target_modules"] if model.pissa else []
        values = {key: getattr(model, key) for key in keys}
        small = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return small | {
        "model": model.model_name_or_path,
        "weights": _weights_digest(resolve(model.model_name_or_path)) if seed is None else None,
        "seed": seed,
        "fine_tuning": model.fine_tuning,  # decides the dtype of the weights
        "device": device,
        "cpu_products": model.cpu_products if device == "cpu" else None,
    }


def _weights_digest(folder: Path) -> str:
    """Knows a folder's weights by the names, sizes, times, beginnings and ends of its files. Those
    written anew count as others: better to compute again than to compare with another model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size, written = path.stat().st_size, path.stat().st_mtime_ns
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} {written} ".encode() + file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read())
    return digest.hexdigest()


def _pair(line: str) -> tuple[bytes, tuple[float, float]] | None:
    """None for a line that was cut short."""
    found = _parsed(line)
    try:
        chosen, rejected = found["log_probs"]
        return bytes.fromhex(found["pair"]), (float(chosen), float(rejected))
    except (KeyError, TypeError, ValueError):
        return None


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
