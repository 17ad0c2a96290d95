"""A model with everything that stands around it, loaded from one folder by one config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ernie
from ernie import kernels
from ernie.chat import LOCK_FILE, ChatTemplate, stop_ids
from ernie.checkpoint.hub import resolve
from ernie.config import ErnieConfig
from ernie.fused import WHOLE, Shard, check_shard, fuse, fuse_head, fused_block, shallow_copy
from ernie.model import ErnieModel
from ernie.quant.scheme import Scheme, read_scheme
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import BatchBuilder
from fastdeploy.engine.blocks import BlockManager
from fastdeploy.engine.cache import cache_allocator, num_cache_blocks
from fastdeploy.engine.core import Engine
from fastdeploy.engine.grammar import make_grammars
from fastdeploy.engine.language import Language, template_for
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.runner import Runner, on, record_steps
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine.speculative import make_drafter, num_ahead
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.engine.vision import PictureRows
from fastdeploy.engine.weights import check_same_network
from fastdeploy.sampling import recommended


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and the two sides of its text. Without a tokenizer it takes and gives token ids."""

    engine: Engine
    config: EngineConfig  # resolved
    tokenizer: Tokenizer | None
    template: ChatTemplate | None  # None where the folder has none
    defaults: dict[str, float]  # sampling settings that the model's folder recommends


def load(config: EngineConfig, model: ErnieModel | None = None) -> Loaded:
    """Read model, tokenizer and chat template; `model` stands in for one that is in memory already.

    Raises ConfigError and the errors of `ernie.load`, each one sentence.
    """
    device = pick_device(config.device, config.tensor_parallel_size)
    if model is None:
        _check_training(config)
    ranks = None
    if config.tensor_parallel_size > 1:
        if model is not None:
            raise ConfigError(
                f"tensor_parallel_size={config.tensor_parallel_size} needs a folder that every "
                "process can read, not a model in memory; save it first, or use 1"
            )
        model, ranks = start_ranks(config, device)
    elif model is None:
        model = read_model(config, device)
    else:  # the caller keeps the plain one
        model = served(shallow_copy(model), config)
    try:
        return _around(model, config, ranks)
    except BaseException:
        if ranks:
            ranks.stop()
        raise


def _check_training(config: EngineConfig) -> None:
    """Refuse a template that is not the one of the training before any weight is read."""
    folder = resolve(config.model)
    if (folder / LOCK_FILE).is_file() and Tokenizer.exists(config.tokenizer or folder):
        Language.read(config)


def read_model(config: EngineConfig, device: torch.device, shard: Shard = WHOLE) -> ErnieModel:
    """The inference form of the model in a folder, of which only one block is ever whole."""
    folder = resolve(config.model)
    scheme = _scheme(ErnieConfig.from_folder(folder), config)
    model = ernie.load(
        folder,
        dtype=getattr(torch, config.dtype),
        device=device,
        keep_integers=True,
        swap_block=lambda block: fused_block(block, scheme, shard),
    )
    return fuse_head(model, scheme, shard)


def reread_model(
    folder: str | Path,
    config: EngineConfig,
    network: ErnieConfig,
    device: torch.device,
    shard: Shard,
) -> ErnieModel:
    """`read_model` of another folder that has the same network; see `weights.read_weights`."""
    config = dataclasses.replace(config, model=str(resolve(str(folder))))
    check_same_network(folder, ErnieConfig.from_folder(config.model), network)
    return read_model(config, device, shard)


def start_ranks(config: EngineConfig, device: torch.device) -> tuple[ErnieModel, Ranks]:
    """Rank 0's slice and the other ranks, each with its own; all read at the same time.

    Raises ConfigError, before a process is started, where a size cannot be shared out.
    """
    config = dataclasses.replace(config, model=str(resolve(config.model)))
    check_shard(ErnieConfig.from_folder(config.model), config.tensor_parallel_size)
    ranks = Ranks.start(config, device)
    try:
        model = read_model(config, ranks.group.device, ranks.group.shard)
        ranks.connect()
    except BaseException:
        ranks.stop()
        raise
    return model, ranks


def _around(model: ErnieModel, config: EngineConfig, ranks: Ranks | None) -> Loaded:
    """The engine of a fused model, and the text around it."""
    choose_kernels(config, model.device)
    tokenizer = Tokenizer.from_folder(config.tokenizer) if config.tokenizer else model.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the model's vocabulary "
            f"{model.config.vocab_size}; they do not belong together"
        )
    config = _with_cache_of_scheme(config, model.config)
    config = config.resolved(
        max_positions=model.config.max_position_embeddings, device_type=model.device.type
    )
    ends = stop_ids(tokenizer) if tokenizer else model.config.eos_token_ids
    tags = ThinkTags.of(tokenizer, config.think_stop_sentence)
    rebuild = partial(served, config=config)
    reread = None
    if ranks:
        device, shard = ranks.group.device, ranks.group.shard
        reread = partial(
            reread_model, config=config, network=model.config, device=device, shard=shard
        )
    grammars = make_grammars(config, tokenizer, model.config.vocab_size, ends)
    engine = make_engine(
        model, config, ends, tags, rebuild=rebuild, reread=reread, ranks=ranks, grammars=grammars
    )
    defaults = recommended(getattr(model, "generation_config", None) or {})
    template = template_for(config, tokenizer)
    return Loaded(engine, config, tokenizer, template, defaults)


def make_engine(
    model: ErnieModel,
    config: EngineConfig,
    eos_ids: Iterable[int] = (),
    think_tags: ThinkTags | None = None,
    *,
    ranks: Ranks | None = None,
    **options: Any,
) -> Engine:
    """The engine of a model in its inference form, or with `ranks` of this one's slice. `config`
    must be resolved (see `EngineConfig.resolved`); `options` are those of `Engine`.

    Raises ConfigError where the cache has no room, or the model cannot draft.
    """
    assert config.max_num_batched_tokens is not None, "the config is not resolved"
    num_blocks = num_cache_blocks(model, config, ranks)
    allocate = cache_allocator(model, config, ranks)
    cache = allocate(num_blocks)
    batches = BatchBuilder(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_blocks=-(-config.max_model_len // config.block_size),
        block_size=config.block_size,
    )
    has_vision = model.config.vision_config is not None
    pictures = PictureRows(config.vision_cache_mib << 20) if has_vision else None
    runner = Runner(model.eval(), cache, batches, ranks, pictures)
    blocks = BlockManager(
        num_blocks,
        config.block_size,
        caching=config.enable_prefix_caching,
        reads_next=config.has_mtp,
    )
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=config.enable_chunked_prefill,
        num_ahead=num_ahead(config.speculation),
    )
    engine = Engine(
        config,
        runner,
        scheduler,
        allocate=allocate,
        drafter=make_drafter(config.speculation, runner),
        eos_ids=eos_ids,
        think_tags=think_tags,
        **options,
    )
    if model.device.type == "cuda":
        with on(model.device):
            engine.sampler.warm_up(model.device)
    record_steps(runner, config)
    return engine


def choose_kernels(config: EngineConfig, device: torch.device) -> None:
    """What is computed with here. Raises ConfigError for a mode that `device` does not have."""
    try:
        kernels.batch_invariant(config.batch_invariant, device.type)
    except ValueError as error:
        raise ConfigError(f"batch_invariant: {error}") from None


def served(model: ErnieModel, config: EngineConfig) -> ErnieModel:
    """The form in which the engine runs a plain model, whose blocks are swapped in place.

    Raises ConfigError for a scheme that is not known, or that is asked of a quantised folder.
    """
    return fuse(model, _scheme(model.config, config))


def _scheme(model: ErnieConfig, config: EngineConfig) -> Scheme | None:
    if config.quantization and "quantization_config" in model.extra:
        raise ConfigError(
            f"quantization={config.quantization} is asked for, but the folder's weights are "
            "quantised already; leave it out"
        )
    return read_scheme(config.quantization, has_experts=model.is_moe)


def _with_cache_of_scheme(config: EngineConfig, model: ErnieConfig) -> EngineConfig:
    """`config` with the cache's dtype where the quantisation names one."""
    scheme = _scheme(model, config)
    written = model.extra.get("quantization_config", {}).get("kv_cache")
    named = scheme.kv_cache if scheme else written
    if named is None or config.kv_cache_dtype == named:
        return config
    if config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype={config.kv_cache_dtype}, but the quantisation says {named}; leave out "
            "one of the two"
        )
    return dataclasses.replace(config, kv_cache_dtype=named)


def pick_device(name: str, num_ranks: int = 1) -> torch.device:
    """The device of rank 0. Raises ConfigError where there is no GPU for each rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not known; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={name!r}, but there is no GPU that torch can use; use cpu or auto"
        )
    if device.type == "cuda" and (device.index or 0) + num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} with device={name!r} takes GPUs up to number "
            f"{(device.index or 0) + num_ranks - 1}, but there are {torch.cuda.device_count()}; "
            "use fewer ranks, or device=cpu"
        )
    return device
