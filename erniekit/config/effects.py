"""Settings that were given and that the run reads nowhere: they are reported, not refused.

A table: what a run must be like, and the keys that mean something only then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from erniekit.config.data import Pictures
from erniekit.config.methods import LOSS_TYPES, Policy, Preferences
from erniekit.config.training import Parallel

if TYPE_CHECKING:
    from erniekit.config import Run

_BALANCE = (
    "moe_aux_loss_lambda", "moe_z_loss_lambda", "moe_orthogonal_loss_lambda",
    "moe_orthogonal_update", "moe_group_orthogonal_loss", "moe_use_aux_free_update_coef",
    "moe_gate_lr_ratio",
)  # fmt: skip
# Those of routers, which a dense model has none of; known when the model is there.
OF_EXPERTS = (*_BALANCE, "moe_capacity")


def _keys(group: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(group))


# Those that divide what several processes hold; known when their number is.
OF_RANKS = ("sharding",)

# Changing these between two starts of a run changes nothing that has been computed.
HARMLESS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_steps", "stop_after_step",
    "ignore_changed_inputs",
    "logging_steps", "save_steps", "save_strategy", "save_total_limit", "use_async_save",
    "load_best_model_at_end", "use_checkpoint", "report_to", "logging_dir", "disable_tqdm",
    "evaluation_strategy", "eval_steps", "max_evaluate_steps", "answer_steps", "num_answers",
    "recompute", "recompute_granularity", "recompute_layers", "no_recompute_layers",
    "offload_optim", "plan_memory_gib",
    *_keys(Parallel),
}  # fmt: skip


def _uses(key: str) -> Callable[[Run], bool]:
    return lambda run: key in run.stage.settings


def _compares_with(loss_type: str) -> Callable[[Run], bool]:
    return lambda run: run.preferences.loss_type == loss_type


def _has_beta(run: Run) -> bool:
    """Not so of a loss on pairs that only scales the recorded rewards by it."""
    return not _uses("loss_type")(run) or run.preferences.loss.uses_beta


def _drops(run: Run) -> bool:
    o = run.optimisation
    return bool(o.hidden_dropout_prob or o.attention_probs_dropout_prob)


def _follows(*schedules: str) -> Callable[[Run], bool]:
    return lambda run: run.optimisation.lr_scheduler_type.partition(":")[0] in schedules


def _draws_by_weight(run: Run) -> bool:
    """Or leaves files out: of files that are each read once a weight says nothing else."""
    data = run.data
    return data.mix_strategy != "concat" or 0 in data.train_dataset_prob


def _counts_epochs(run: Run) -> bool:
    training = run.training
    every = {training.save_strategy, training.evaluation_strategy if _evaluates(run) else "no"}
    return training.max_steps == -1 or "epoch" in every


def _evaluates(run: Run) -> bool:
    training = run.training
    return training.do_eval and training.evaluation_strategy != "no"


ONLY_WHERE: tuple[tuple[Callable[[Run], bool], tuple[str, ...]], ...] = (
    *((_uses(key), (key,)) for key in (*_keys(Preferences), *_keys(Policy))),
    *((_compares_with(name), row.settings) for name, row in LOSS_TYPES.items()),
    (lambda run: run.stage.reads_pictures, _keys(Pictures)),
    (_drops, ("dropout_warmup_steps",)),
    (_evaluates, ("max_evaluate_steps", "metric_for_best_model", "greater_is_better")),
    (lambda run: run.training.do_eval, ("evaluation_strategy",)),
    (
        lambda run: _evaluates(run) and run.training.evaluation_strategy == "steps",
        ("eval_steps",),
    ),
    (lambda run: run.training.save_strategy == "steps", ("save_steps",)),
    (_counts_epochs, ("num_train_epochs",)),
    (lambda run: run.training.max_grad_spike > 0, ("grad_spike_window",)),
    (lambda run: run.data.dataloader_num_workers > 0, ("prefetch_factor",)),
    (lambda run: run.data.mix_strategy == "random", ("num_samples_each_epoch",)),
    (lambda run: bool(run.data.text_dataset_path), ("modality_ratio",)),
    (lambda run: run.data.input_dir is not None, ("split",)),
    (lambda run: run.data.packing, ("greedy_intokens",)),
    (lambda run: run.stage.sample == "document" and run.data.packing, ("truncate_packing",)),
    (_draws_by_weight, ("train_dataset_prob",)),
    (lambda run: not _follows("constant")(run), ("warmup_steps", "warmup_ratio")),
    (lambda run: not run.optimisation.warmup_steps, ("warmup_ratio",)),
    (_follows("linear", "cosine", "wsd"), ("min_lr",)),
    (_follows("linear", "cosine", "polynomial"), ("decay_steps",)),
    (_follows("cosine"), ("num_cycles",)),
    (_follows("polynomial"), ("lr_end", "power")),
    (_follows("wsd"), ("decay_function",)),
    (lambda run: run.optimisation.optim == "muon", ("muon_momentum",)),
    (
        lambda run: run.model.recompute,
        ("recompute_granularity", "recompute_layers", "no_recompute_layers"),
    ),
    (lambda run: not run.model.recompute_layers, ("recompute_granularity",)),
    (lambda run: run.chooses_layers, ("plan_memory_gib",)),
    (lambda run: not run.stage.judges_answers, ("token_balance_loss",)),
    (lambda run: not run.is_lora, _BALANCE),
    (lambda run: run.model.num_nextn_predict_layers > 0, ("multi_token_pred_lambda",)),
    (
        lambda run: run.model.moe_orthogonal_loss_lambda != 0,
        ("moe_orthogonal_update", "moe_group_orthogonal_loss"),
    ),
    (
        lambda run: run.is_lora,
        ("lora_rank", "lora_alpha", "rslora", "rslora_plus", "lora_plus_scale"),
    ),
    (lambda run: "model" in run.policy.reward, ("reward_model",)),
    (lambda run: run.policy.rollout_correction == "icepop", ("correction_low",)),
    (lambda run: run.policy.rollout_correction != "none", ("correction_high",)),
    (
        lambda run: run.policy.policy_loss != "none",
        ("clip_low", "clip_high", "advantage_std", "normalize_rewards", "rollout_correction"),
    ),
    (
        lambda run: run.policy.policy_loss != "none" or run.policy.kl_coef > 0,
        ("loss_aggregation",),
    ),
    (lambda run: run.policy.dynamic_sampling, ("min_reward_std", "max_refills")),
    (lambda run: not run.stage.has_rollouts, ("packing",)),
    (lambda run: bool(run.policy.curriculum_shares), ("curriculum_files",)),
    (
        lambda run: not run.stage.has_rollouts or max(run.policy.phase_sizes, default=2) > 1,
        ("train_dataset_prob", "mix_strategy"),
    ),
    (
        lambda run: not run.stage.has_rollouts or bool(run.policy.pair_dataset_path),
        ("mask_out_eos_token", "max_prompt_len", "pair_dataset_type"),
    ),
    (lambda run: not run.stage.has_rollouts or run.policy.upo_mu > 0, ("beta",)),
    (_has_beta, ("beta",)),
    (lambda run: not run.preferences.loss.uses_means, ("normalize_logps",)),
    (lambda run: not run.model.rslora_plus, ("rslora", "lora_alpha", "lora_plus_scale")),
    (lambda run: run.policy.upo_mu > 0 and not run.policy.pair_dataset_path, ("pair_min_gap",)),
)


def without_effect(run: Run, given: Mapping[str, Any]) -> list[str]:
    """The keys among those with another value than the default that do nothing in the run."""
    unused = {key for is_used, keys in ONLY_WHERE if not is_used(run) for key in keys}
    return [key for key in given if key in unused and not _is_off(key, given[key])]


def told(run: Run, key: str) -> str:
    """A key without effect, with what has the effect instead where another key does."""
    if key == "beta" and not _has_beta(run):
        loss = f"the loss of {run.preferences.loss_type}, whose weight is pref_loss_ratio"
        return f"beta (on {loss}; it scales recorded rewards)"
    return key


def of_experts(given: Mapping[str, Any]) -> list[str]:
    """The keys among those with another value than the default that do nothing in a dense model."""
    return [key for key in given if key in OF_EXPERTS and not _is_off(key, given[key])]


def of_ranks(given: Mapping[str, Any]) -> list[str]:
    """The keys among those with another value than the default that do nothing in one process."""
    return [key for key in given if key in OF_RANKS]


def _is_off(key: str, value: Any) -> bool:
    """Whether a key of routers switches something off that is not there anyway."""
    return key in OF_EXPERTS and not value
