"""What a training run will take, from its settings alone: memory by part, and arithmetic.

The network is built on the meta device, so nothing is read and nothing is allocated. Weights,
sums of gradients, the optimizer's state, the average of the weights (`ema_decay`) and the copy that
`use_async_save` writes from are exact. Activations are what autograd keeps in our
own blocks, counted in words (`layer_words`, checked against autograd in the tests); the peak is the
largest of the moments of a step:

    head       everything kept, and a chunk of logits
    layer l    sums of the layers above l, activations of l and those below, temporaries of l
    tower      all sums, activations of the vision tower, temporaries of a block of it
    update     all sums, no activations
    loading    where a rank gives up weights that it has read
    round      all sums, and the cache of the answers that are drawn (stage UPO)

Rows are taken as full: the plan is for the longest batch, of pairs for one that is nearly all
prompt, of a stage that reads pictures for the larger of one that is all text and one that is all
images; what lies between takes less. Refused: degrees that are no positive numbers.

Legend: T tokens of a batch, D hidden size, I width of the feed-forward, M of an expert, E experts,
K chosen ones, H query heads, G key heads, d head width, r rank of the adapters.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ernie.config import ErnieConfig
from ernie.kernels.reference import MOMENT_BLOCK
from ernie.kernels.weights import quantized_bytes
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from ernie.vision.config import VisionConfig
from erniekit.build import check_layers, config_of, frozen_form, still, weights_dtype
from erniekit.config import Optimisation, Run
from erniekit.config.model import TOWER
from erniekit.lora import projections
from erniekit.lora_targets import chosen
from erniekit.optim import is_matrix
from erniekit.parallel.replicated import owners_of
from erniekit.reward_model import HEAD, add_reward_head, base_of

GIB = 2**30
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

# Resident memory of a process with torch and this package imported and its thread pool running.
CPU_BASE = 265 * 2**20
TOKENIZER_BYTES = 700  # resident, by token of the vocabulary
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # summed apart, in float32
GPU_BASE = 0  # peaks on a GPU count tensors only
BLOCK_BUFFER = 16 * 2**20  # of bfloat16 weights widened block by block (ernie.kernels.cpu)


@dataclass(frozen=True)
class Degrees:
    """Over how many processes each kind of division spreads one copy of the model, and how many
    such copies there are.

    What `sharding` divides is the run's own setting.
    """

    tensor: int = 1
    pipeline: int = 1
    sharding: int = 1
    expert: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"the {name} degree {value} is too small; give 1 or more")

    @property
    def num_ranks(self) -> int:
        """Of one copy."""
        return self.tensor * self.pipeline * max(self.sharding, self.expert)

    @property
    def num_readers(self) -> int:
        """Of all copies, how many ranks (groups of them, that divide a layer) have own rows."""
        return max(self.sharding, self.expert) * self.copies


@dataclass
class Sizes:
    """Bytes of what lives through a step on one rank, by layer number; -1 is outside the blocks."""

    weights: Counter[int] = field(default_factory=Counter)
    sums: Counter[int] = field(default_factory=Counter)
    state: Counter[int] = field(default_factory=Counter)
    average: Counter[int] = field(default_factory=Counter)
    largest: Counter[int] = field(default_factory=Counter)  # trained elements of one tensor
    gathered: int = 0  # weights that lie whole beside this rank's shard of them
    trained: dict[str, int] = field(default_factory=dict)  # elements by name
    visiting: int = 0  # the largest state of one tensor, on a GPU where the rest is not
    others: int = 0  # weights of models beside the trained one
    pinned: int = 0  # all state where it lies in pinned blocks, which are powers of two
    num_params: int = 0
    num_trained: int = 0


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank at its peak, and the arithmetic of a step."""

    parts: dict[str, int]
    moment: str  # at which the peak is reached
    num_params: int
    num_trained: int
    tokens_per_step: int  # of all ranks together
    flops_per_step: float  # of one rank
    checkpoint_bytes: int
    final_bytes: int
    offloaded_bytes: int  # of the optimizer's state, pinned in the memory of the host
    copied_bytes: int  # what rank 0 writes from while a GPU trains on, in the memory of the host

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def plan(run: Run, device: str, degrees: Degrees = Degrees()) -> Plan:
    """The plan of a `resolved` run on a `device` ("cpu" or "cuda").

    Raises ConfigError for a model that is not known or cannot be trained here, and for layers that
    it does not have.
    """
    return planner(run, device, degrees)(run)


def planner(run: Run, device: str, degrees: Degrees = Degrees()) -> Callable[[Run], Plan]:
    """A function that plans runs that differ from `run` only in what they compute again."""
    config = config_of(run.model.model_name_or_path)
    check_layers(run, config)
    sizes = sizes_of(config, run, device, degrees)
    batch = _batch_tokens(run)
    trained = 4 * sizes.num_trained
    whole = sizes_of(config, run, device, dataclasses.replace(degrees, sharding=1))
    kept = trained if run.is_lora else whole.weights.total()
    saved = kept + whole.state.total() + whole.average.total()
    sizes.others = _other_models(config, run, device, whole)
    copy = saved * run.training.use_async_save
    on_gpu = device != "cpu"  # where the copy lies in the host's memory
    is_offloaded = on_gpu and run.optimisation.offload_optim
    if is_offloaded:
        sizes.state.clear()
    else:
        sizes.visiting = 0
    tokens = batch * run.training.gradient_accumulation_steps
    final = trained if run.is_lora else 2 * sizes.num_params

    def planned(run: Run) -> Plan:
        of_banks = (
            _peak(config, run, device, degrees, sizes, batch, 0 if on_gpu else copy, bank)
            for bank in banks(config, run)
        )
        parts, moment = max(of_banks, key=lambda found: sum(found[0].values()))
        return Plan(
            parts,
            moment,
            sizes.num_params,
            sizes.num_trained,
            tokens * degrees.num_readers,
            _flops(config, run, tokens) / (degrees.tensor * degrees.pipeline),
            saved,
            final * (2 if sizes.average else 1),
            round(sizes.pinned / degrees.pipeline) if is_offloaded else 0,
            copy if on_gpu else 0,
        )

    return planned


# --- what lives through a step ---


def sizes_of(config: ErnieConfig, run: Run, device: str, degrees: Degrees = Degrees()) -> Sizes:
    """Exact bytes of weights, sums of gradients and optimizer state on the fullest rank."""
    dtype = weights_dtype(run, device)
    model = ErnieModel(config, dtype=dtype, device="meta")
    sizes = Sizes()
    is_scored = run.stage.has_reward_head
    if is_scored:
        add_reward_head(model, seed=0)
    left = still(dict(model.named_parameters()), run)
    weights = dict(projections(model)) if run.is_lora else {}
    few_bits = {id(w): form for n, w in weights.items() if (form := frozen_form(run, n))}
    for name, p in model.named_parameters():
        width: float = p.element_size()
        if id(p) in few_bits:
            width = quantized_bytes(p.shape, few_bits[id(p)]) / p.numel()
        trained = ((not run.is_lora and p.requires_grad) or name == HEAD) and name not in left
        if name.startswith("model.mtp."):
            trained = trained and bool(run.model.num_nextn_predict_layers)
        apart = name in VOCABULARY
        by_muon = is_matrix(name, p.dim())
        _add(sizes, name, p.numel(), width, trained, apart, by_muon, run, degrees)
    for name in chosen(weights, run.model.lora_target_modules) if run.is_lora else ():
        *stack, out_size, in_size = weights[name].shape
        counts = [run.model.lora_rank * in_size, run.model.lora_rank * out_size]
        for part, count in enumerate([*counts, *[out_size] * run.model.use_dora]):
            count *= math.prod(stack)
            _add(sizes, f"{name}.{part}", count, 4, True, False, False, run, degrees)
    if run.model.use_dora and run.is_lora:  # the known squares of rows, as many as magnitudes
        for name in chosen(weights, run.model.lora_target_modules):
            layer = int(name.split(".")[2])
            sizes.weights[layer] += 4 * math.prod(weights[name].shape[:-1])
    if degrees.sharding > 1:
        _shard(sizes, run, degrees.sharding)
    return sizes


def _shard(sizes: Sizes, run: Run, shards: int) -> None:
    """What `sharding` divides, on the fullest rank.

    stage1 gives whole parameters to owners. stage2 and stage3 cut all of them, and put together all
    weights for a step, or those outside the blocks, the block that computes and the next one; and a
    block's gradients, before they are cut.
    """
    stage = run.parallel.sharding or "stage1"
    share = 1 / shards
    if stage == "stage1":
        loads: Counter[int] = Counter()
        for name, owner in owners_of(sizes.trained, shards).items():
            loads[owner] += sizes.trained[name]
        share = max(loads.values()) / sum(loads.values())
    else:
        blocks = [count for layer, count in sizes.weights.items() if layer >= 0]
        whole = sizes.weights[-1] + 2 * max(blocks) if stage == "stage3" else sizes.weights.total()
        sizes.gathered = whole + (0 if run.is_lora else max(blocks))
        _scale(sizes.weights, share)
        _scale(sizes.sums, share)
        sizes.visiting = math.ceil(sizes.visiting * share)
    sizes.pinned = math.ceil(sizes.pinned * share)
    _scale(sizes.state, share)


def _scale(counts: Counter[int], share: float) -> None:
    for key in counts:
        counts[key] = math.ceil(counts[key] * share)


def _add(
    sizes: Sizes,
    name: str,
    numel: int,
    width: float,
    trained: bool,
    float32_sum: bool,
    by_muon: bool,
    run: Run,
    degrees: Degrees,
) -> None:
    match = _LAYER.match(name)
    layer = int(match[1]) if match else -1
    sizes.num_params += numel
    sizes.num_trained += numel * trained
    if trained:
        sizes.trained[name] = numel
    experts = ".experts" in name and degrees.expert > 1
    count = numel // (degrees.expert if experts else degrees.tensor)
    sizes.weights[layer] += round(count * width)
    if not trained:
        return
    o = run.optimisation
    original = 4 if width < 4 else 0
    # A single gradient is its own sum, and has the weight's dtype; not where whole ones travel.
    travels = degrees.sharding > 1 and run.parallel.sharding in (None, "stage1")
    is_short = width == 2 and run.training.gradient_accumulation_steps == 1 and not travels
    is_long = float32_sum or (o.amp_master_grad and not is_short)
    if float32_sum or not o.optimizer_in_backward:  # else a gradient is gone when it is complete
        sizes.sums[layer] += count * (4 if is_long else 2)
    state = [*_moment_bytes(o, count, by_muon), count * original]
    sizes.state[layer] += sum(state)
    sizes.visiting = max(sizes.visiting, sum(state))
    sizes.pinned += sum(1 << (size - 1).bit_length() for size in state if size)
    if o.ema_decay:
        sizes.average[layer] += count * 4
    sizes.largest[layer] = max(sizes.largest[layer], count)


def _moment_bytes(o: Optimisation, count: int, by_muon: bool) -> tuple[int, ...]:
    """Of each tensor that the optimizer remembers of a weight of `count` elements, besides its
    original.
    """
    if o.optim == "adamw_8bit":
        return count, count, 2 * 4 * math.ceil(count / MOMENT_BLOCK)
    if o.optim == "muon" and by_muon:
        return (4 * count,)
    return (count * (2 if o.use_lowprecision_moment else 4),) * 2


def _batch_tokens(run: Run) -> int:
    """Tokens of a batch that is full: of rows, or of prompts and their answers (stage UPO)."""
    if not run.stage.has_rollouts:
        return run.training.batch_size * run.data.max_seq_len
    p = run.policy
    batches = p.num_mini_batches * run.training.gradient_accumulation_steps
    prompts = math.ceil(p.prompts_per_round / batches)
    return prompts * (_prompt_tokens(run) + p.num_generations * p.max_completion_length)


def _prompt_tokens(run: Run) -> int:
    return run.data.max_seq_len - run.policy.max_completion_length


def _laid_out(run: Run) -> float:
    """How many tokens attention is given for one: more where answers share a prompt, of pairs that
    are nearly all prompt two.
    """
    if run.stage.has_rollouts:
        answers, length = run.policy.num_generations, run.policy.max_completion_length
        prompt = _prompt_tokens(run)
        return answers * (prompt + length) / (prompt + answers * length)
    return 2.0 if run.stage.sample == "pair" else 1.0


def _other_models(config: ErnieConfig, run: Run, device: str, whole: Sizes) -> int:
    """Bytes of the models that stage UPO holds on each rank: a frozen reference, what answers are
    drawn from, and a reward model.
    """
    if not run.stage.has_rollouts:
        return 0
    p, base = run.policy, 2 * config.num_params()
    total = 0
    if p.has_reference and not run.is_own_reference:
        total += whole.weights.total()
    if run.generates_apart and p.rollout_server is None:
        total += base
    if p.reward_model is not None and "model" in p.reward:
        total += 2 * config_of(str(base_of(Path(p.reward_model)))).num_params()
    return total


def _round(config: ErnieConfig, run: Run, word: int) -> dict[str, float]:
    """Bytes while answers are drawn, as many at once and as long as they may be."""
    p = run.policy
    rows = min(p.rollout_max_seqs, p.prompts_per_round * p.num_generations)
    rows = max(rows, p.num_generations)
    prompts = math.ceil(rows / p.num_generations) * _prompt_tokens(run)
    tokens = rows * p.max_completion_length + prompts
    cached = 2 * config.num_hidden_layers * config.kv_size * word
    return {"cache": tokens * cached, "temporaries": rows * config.vocab_size * (3 * word + 16)}


# --- activations ---


def banks(config: ErnieConfig, run: Run) -> range:
    """Of what a row may be full: text (0), and images (1) where they are read."""
    return range(1 + (config.vision_config is not None and run.stage.reads_pictures))


def layer_words(config: ErnieConfig, run: Run, layer: int, bank: int = 0) -> dict[str, float]:
    """Words per token of a `bank` that autograd keeps of a block when nothing of it is computed
    again.

    A word is an element of the activations' dtype; int64 indices count two, as on a CPU. Every
    projection is taken to have an adapter.
    """
    c, rank = config, run.model.lora_rank * run.is_lora
    laid = _laid_out(run)
    d, dora = c.hidden_size, run.model.use_dora * run.is_lora  # DoRA keeps what it rescales
    drop = run.is_lora * bool(run.model.lora_dropout)  # each adapter reads rows of its own
    attended = 2.0 * c.q_size + 2 * c.kv_size + c.num_attention_heads
    # With a prompt laid out once for each of its answers, the result is laid back; else an adapter
    # that reads rows of its own does not read the result that is kept anyway.
    attended = laid * attended + (1 if laid > 1 else drop) * c.q_size
    words = {
        "stream": 2.0 * (d + 1),  # the two inputs of norms, and their scales
        "attention_input": float(d),
        "attention": attended + 4 * rank + dora * (c.q_size + 2 * c.kv_size + d) + drop * 3 * d,
        "mlp_input": float(d),
    }
    if not c.is_moe_layer(layer):
        rescaled = dora * (2 * c.intermediate_size + d) + drop * (2 * d + c.intermediate_size)
        return words | {"mlp": 2.0 * c.intermediate_size + 3 * rank + rescaled}
    top_k, size, experts = c.moe_k or 0, c.expert_sizes[bank], c.experts_per_bank[bank]
    routing = 2 * experts + 2 * top_k + 2 * top_k + 2
    indices = 2 * 2 * top_k
    rows = top_k * (d + 3 * size + d + 2 * rank + dora * (2 * size + d))
    shared = 0
    if c.shared_size:
        shared = (2 + 2 * dora + drop) * c.shared_size + 3 * rank + (dora + 2 * drop) * d
    parted = d if bank else 0  # tokens of vision, set apart
    return words | {"mlp": float(routing + indices + rows + shared + parted)}


def kept_words(config: ErnieConfig, run: Run, layer: int, bank: int = 0) -> float:
    """Words per token of a bank kept of a block from the forward to the backward pass."""
    words = layer_words(config, run, layer, bank)
    granularity = run.recomputed(layer)
    if layer == 0 and run.is_lora:  # nothing below is trained: its first norm keeps nothing
        remade = granularity != "full_attn" and not run.model.lora_dropout
        words["stream"] -= 1 + config.hidden_size * (not remade)
    if granularity == "full":
        routing = 2 * config.experts_per_bank[bank] if config.is_moe_layer(layer) else 0
        return config.hidden_size + routing
    # What norms make is made again for its readers, but is the input of a part that is recomputed.
    dropped = {
        "full_attn": {"attention", "mlp_input"},
        "mlp": {"mlp", "attention_input"},
    }.get(granularity or "", {"attention_input", "mlp_input"})
    return sum(count for part, count in words.items() if part not in dropped)


def picture_words(config: ErnieConfig, run: Run) -> float:
    """Words per token that autograd keeps of tower and resampler, where every token is an image's:
    of merge x merge patches. Nothing of parts that are frozen and have none before them.
    """
    vision = config.vision_config
    if vision is None or run.is_lora:
        return 0.0
    wide, patches = vision.embed_dim, vision.spatial_merge_size**2
    resampler = _resampler_words(config, vision)
    if "freeze_vision" in run.model.freeze_config:
        return float(resampler)
    block = 6 * wide + vision.intermediate_size + vision.num_heads + 4
    if run.recomputed(TOWER) == "full":
        block = wide
    around = vision.patch_elements + wide + wide // vision.num_heads  # pixels, result, angles
    return float(resampler + patches * (vision.depth * block + around))


def _resampler_words(config: ErnieConfig, vision: VisionConfig) -> int:
    return 10 * vision.spatial_merge_size**2 * vision.embed_dim + 2 * config.hidden_size + 4


def _tower_backward(config: ErnieConfig, run: Run) -> tuple[float, float]:
    """Words per token of the tower's activations, and what the backward pass of its last block
    holds besides: what is computed again of it, and gradients before and after its activation.
    """
    vision = config.vision_config
    assert vision is not None
    kept = picture_words(config, run) - _resampler_words(config, vision)
    if kept <= 0:  # LoRA, or frozen
        return 0.0, 0.0
    wide, inner = vision.embed_dim, vision.intermediate_size
    block = 2 * wide + 2 * inner
    if run.recomputed(TOWER) == "full":
        block += 7 * wide + inner + vision.num_heads + 4
    return kept, float(vision.spatial_merge_size**2 * block)


def _passing_words(config: ErnieConfig) -> float:
    """Words per token that tower and resampler hold at once while they read images: pixels, and
    what a block makes.
    """
    vision = config.vision_config
    assert vision is not None
    block = 4 * vision.embed_dim + 2 * vision.intermediate_size
    return vision.spatial_merge_size**2 * (2 * vision.patch_elements + block)


def _temporary_words(config: ErnieConfig, run: Run, layer: int, bank: int) -> float:
    """Words per token that the backward pass of a block holds at once besides what was kept."""
    words = layer_words(config, run, layer, bank)
    recomputed = sum(words.values()) - kept_words(config, run, layer, bank)
    d = config.hidden_size
    if config.is_moe_layer(layer):
        top_k, size = config.moe_k or 0, config.expert_sizes[bank]
        return recomputed + top_k * (2 * d + 5 * size) + 3 * d
    return recomputed + 4 * config.intermediate_size + 3 * d


def _widest(config: ErnieConfig, layer: int, bank: int) -> int:
    """Elements per token of the widest rows that a product of a block reads, or their gradient."""
    widest = max(config.q_size, config.hidden_size, config.intermediate_size)
    if not config.is_moe_layer(layer):
        return widest
    of_experts = max(2 * config.expert_sizes[bank], config.hidden_size)
    return max(widest, (config.moe_k or 0) * of_experts)


def _rounded_bytes(rows: float, weight: int, device: str) -> float:
    """What a product in FP8 holds besides, by elements of its factors: 8 bits of both, on a CPU the
    float32 values that these stand for too."""
    return 4.0 * rows + 9.0 * weight if device == "cpu" else rows + weight


def _peak(
    config: ErnieConfig,
    run: Run,
    device: str,
    degrees: Degrees,
    sizes: Sizes,
    batch: int,
    copy: int,
    bank: int,
) -> tuple[dict[str, int], str]:
    """Bytes by part at the fullest moment of a step on rows full of a bank, and its name."""
    word = 4 if device == "cpu" else 2
    unit = word * batch / degrees.tensor
    layers = range(config.num_hidden_layers)
    is_fp8 = run.model.compute_type == "fp8"
    kept = [unit * kept_words(config, run, n, bank) for n in layers]
    chunk = min(run.model.loss_subbatch_seqlen, batch) if not run.stage.has_reward_head else 0
    vocabulary = config.vocab_size / degrees.tensor
    head = {
        "activations": sum(kept) + unit * (config.hidden_size + config.head_dim),
        "loss": chunk * vocabulary * word + unit * 3 * config.hidden_size,
        "gradients": sizes.sums[-1],
    }
    update: dict[str, float] = {"gradients": sizes.sums.total(), "temporaries": sizes.visiting}
    visiting = sizes.visiting * run.optimisation.optimizer_in_backward
    moments: dict[str, dict[str, float]] = {"the loss": head, "the update": update}
    all_at_once = run.training.gradient_accumulation_steps > 1
    if all_at_once:
        head["gradients"] = sizes.sums.total()
    done = sizes.sums[-1]
    for n in reversed(layers):
        done += sizes.sums[n]
        rows = _widest(config, n, bank) * batch / degrees.tensor
        moments[f"layer {n} backward"] = {
            "activations": sum(kept[: n + 1]) + unit * 2 * config.hidden_size,
            "temporaries": unit * _temporary_words(config, run, n, bank)
            + visiting
            + word * sizes.largest[n]
            + is_fp8 * _rounded_bytes(rows, sizes.largest[n], device),
            "gradients": sizes.sums.total() if all_at_once else done,
        }
    if bank:
        seen = unit * picture_words(config, run)
        for name in set(moments) - {"the update"}:
            moments[name]["activations"] += seen
        moments["the pictures"] = {
            "activations": seen,
            "temporaries": unit * _passing_words(config),
            "gradients": sizes.sums.total() if all_at_once else 0,
        }
        tower, passing = _tower_backward(config, run)
        moments["the tower backward"] = {
            "activations": unit * tower,
            "temporaries": unit * passing,
            "gradients": sizes.sums.total(),
        }
    for parts in moments.values():
        parts["gathered"] = sizes.gathered / degrees.pipeline
        parts["gradients"] /= degrees.pipeline
        parts["optimizer"] = sizes.state.total() / degrees.pipeline
        parts["average"] = sizes.average.total() / degrees.pipeline
        parts["copy"] = copy / degrees.pipeline
    if run.stage.has_rollouts and run.policy.rollout_server is None:
        moments["the answers of a round"] = moments["the update"] | _round(config, run, word)
    if device == "cpu" and run.model.continue_training and sizes.gathered:
        # A rank reads the whole model before it gives up what is not its own.
        moments["loading"] = {"gathered": (degrees.sharding - 1) * sizes.weights.total()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    resident = {
        "weights": sizes.weights.total() / degrees.pipeline,
        "other models": sizes.others,
        **moments[moment],
        "process": _process_bytes(config, run, device),
    }
    names = (
        "weights", "other models", "gathered", "gradients", "optimizer", "average", "copy",
        "cache", "activations", "temporaries", "loss", "process",
    )  # fmt: skip
    return {name: round(resident.get(name, 0)) for name in names}, moment


def _process_bytes(config: ErnieConfig, run: Run, device: str) -> int:
    if device != "cpu":
        return GPU_BASE
    buffer = BLOCK_BUFFER if run.is_lora else 0
    return CPU_BASE + TOKENIZER_BYTES * config.vocab_size + buffer


# --- arithmetic ---


def _flops(config: ErnieConfig, run: Run, tokens: int) -> float:
    """Forward once, backward twice as much (once with frozen weights), and what is done again.

    Of judged answers, the head is done again where it is trained, and all tokens are taken to be
    answers; what is measured over a step before it is one forward pass more. A reward model has no
    such head.
    """
    head = 2 * tokens * config.hidden_size * config.vocab_size
    forward = tokens * config.flops_per_token(run.data.max_seq_len // 2)
    again = tokens * sum(again_flops(config, run, n) for n in range(config.num_hidden_layers))
    times = 2 if run.is_lora else 3
    stage = run.stage
    if stage.reads_pictures and (vision := config.vision_config):
        is_frozen = run.is_lora or "freeze_vision" in run.model.freeze_config
        once = 2 * tokens * vision.spatial_merge_size**2 * vision.num_params
        again += once * (1 if is_frozen else times)
        again += tokens * tower_again_flops(config, run)
    if stage.has_reward_head:
        return (forward - head) * times + again
    reads_loss = "loss_type" in stage.settings
    times += stage.measures_step or (reads_loss and run.preferences.loss.uses_baselines)
    return forward * times + head * (stage.sums_log_probs and not run.is_lora) + again


def tower_again_flops(config: ErnieConfig, run: Run) -> float:
    """As `again_flops` of the vision tower, per token of which all are images'."""
    vision = config.vision_config
    is_still = run.is_lora or "freeze_vision" in run.model.freeze_config
    if vision is None or is_still or run.recomputed(TOWER) != "full":
        return 0.0
    block = 4 * vision.embed_dim + vision.intermediate_size
    return 2.0 * vision.spatial_merge_size**2 * vision.depth * vision.embed_dim * block


def again_flops(config: ErnieConfig, run: Run, layer: int) -> float:
    """Operations per token of text that the backward pass of a layer does a second time.

    The last product of what is recomputed is not among them: all that is asked for is there before
    it. What routed experts give is asked for, for the gradient of their weights in the sum.
    """
    c, granularity = config, run.recomputed(layer)
    attention = 2.0 * c.hidden_size * (c.q_size + 2 * c.kv_size)
    attention += 4 * c.q_size * (run.data.max_seq_len // 2)
    if c.is_moe_layer(layer):
        rows = 3 * (c.moe_k or 0) * c.expert_sizes[0] + 2 * c.shared_size + c.experts_per_bank[0]
    else:
        rows = 2 * c.intermediate_size
    mlp = 2.0 * c.hidden_size * rows
    whole = attention + 2 * c.hidden_size * c.q_size + mlp
    return {"full_attn": attention, "mlp": mlp, "full": whole}.get(granularity or "", 0.0)
