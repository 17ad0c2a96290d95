"""What settings must fulfil together: every refusal is one sentence."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ernie.quant.scheme import FROZEN
from ernie.settings import ConfigError, check_bounds, listed
from erniekit.config.methods import SMOOTHING, Preferences
from erniekit.config.model import AUTO, parts_again
from erniekit.config.services import SINKS
from erniekit.config.stages import FORMATS
from erniekit.config.training import SCHEDULES

if TYPE_CHECKING:
    from erniekit.config import Run

FREEZE_WORDS = ("freeze_vision", "freeze_lm")


def validate(run: Run) -> None:
    """Checks that concern more than one key, and ranges; raises ConfigError."""
    for group in run.groups:
        check_bounds(group)
    _check_recomputed(run)
    _check_services(run)
    for split in ("train", "eval", "text"):
        _check_sources(run, split)
    if run.data.input_dir is not None:
        _check_indexed(run)
    _check_multimodal(run)
    _check_schedule(run)
    _check_safety(run)
    _check_trained(run)
    _check_adapters(run)
    _check_dropout(run)
    _check_capacity(run)
    if run.stage.judges_answers:
        _check_preferences(run)
    if "loss_type" in run.stage.settings:
        _check_loss_type(run.preferences)
    if run.stage.has_rollouts:
        _check_policy(run)
    _check_evaluation(run)


def _check_evaluation(run: Run) -> None:
    training = run.training
    is_asked = training.do_eval and training.evaluation_strategy != "no"
    if is_asked and not run.data.files("eval"):
        raise ConfigError(
            f"evaluation_strategy={training.evaluation_strategy} has no data to evaluate on; give "
            "eval_dataset_path, or evaluation_strategy: no"
        )


def _check_recomputed(run: Run) -> None:
    model = run.model
    again = parts_again(model.recompute_layers)
    if again and model.recompute_granularity == AUTO:
        raise ConfigError(
            f"recompute_granularity=auto chooses what recompute_layers={model.recompute_layers[0]} "
            "says; give one of them"
        )
    if both := sorted(again.keys() & {*model.no_recompute_layers}, key=str):
        raise ConfigError(
            f"layer {both[0]} is in recompute_layers and in no_recompute_layers; give it in one"
        )


def _check_services(run: Run) -> None:
    for name in run.reporting.report_to:
        if name not in SINKS:
            raise ConfigError(f"report_to={name!r} is not known; use {', '.join(SINKS)}")


def _check_schedule(run: Run) -> None:
    """The learning rate, and when weights are updated."""
    training, o = run.training, run.optimisation
    schedule, _, steady = o.lr_scheduler_type.partition(":")
    if schedule not in SCHEDULES or (steady and not (schedule == "wsd" and steady.isdigit())):
        raise ConfigError(
            f"lr_scheduler_type={o.lr_scheduler_type!r} is not known; use one of "
            f"{', '.join(SCHEDULES)}, or wsd:<step>"
        )
    if o.min_lr > o.learning_rate:
        raise ConfigError(
            f"min_lr={o.min_lr} is above learning_rate={o.learning_rate}; it is the floor of the "
            "schedule"
        )
    if o.optimizer_in_backward and (o.max_grad_norm or training.gradient_accumulation_steps > 1):
        raise ConfigError(
            f"optimizer_in_backward cannot go with max_grad_norm={o.max_grad_norm:g} and "
            f"gradient_accumulation_steps={training.gradient_accumulation_steps}, which need all "
            "gradients first; give max_grad_norm: 0 and gradient_accumulation_steps: 1"
        )


def _check_trained(run: Run) -> None:
    """What only LoRA trains, or only full training."""
    model = run.model
    if run.is_lora and model.num_nextn_predict_layers:
        raise ConfigError(
            "num_nextn_predict_layers trains a block of the model itself; use fine_tuning: Full"
        )
    if model.lora_path and not run.is_lora:
        raise ConfigError("lora_path is an adapter to start from; it needs fine_tuning: LoRA")
    if run.is_lora and model.freeze_parameters:
        raise ConfigError(
            "freeze_parameters chooses what full training leaves out; LoRA trains its adapters "
            "alone: use fine_tuning: Full"
        )
    if run.is_lora and not model.continue_training:
        raise ConfigError(
            "continue_training=false starts from random weights, which adapters would leave as "
            "they are; use fine_tuning: Full"
        )


def _check_capacity(run: Run) -> None:
    capacity = run.model.moe_capacity
    if capacity is not None and run.stage.judges_answers:
        raise ConfigError(
            f"moe_capacity={capacity:g} drops tokens of the answers that stage={run.model.stage} "
            "compares; leave it out"
        )
    if capacity is not None and run.data.padding:
        raise ConfigError(
            f"moe_capacity={capacity:g} counts the tokens of a batch, and padding=True fills it "
            "with some of no sample; give padding: false"
        )


def _check_multimodal(run: Run) -> None:
    data = run.data
    for word in run.model.freeze_config:
        if word not in FREEZE_WORDS:
            raise ConfigError(
                f"freeze_config={word!r} is not known; use {' or '.join(FREEZE_WORDS)}"
            )
    if len(data.modality_ratio) != 2 or not data.modality_ratio[1]:
        raise ConfigError(
            f"modality_ratio={list(data.modality_ratio)} must be two shares, of text and of "
            "pictures, the second above 0, as in 1,1"
        )
    if not run.stage.needs_pictures:
        if data.text_dataset_path:
            raise ConfigError(
                "text_dataset_path is mixed into data with pictures (stage: VL-SFT); use "
                "train_dataset_path"
            )
        return
    check_every_weight_is_used(run)


def check_every_weight_is_used(run: Run) -> None:
    """Raises ConfigError for a division that a batch without pictures of a VL model cannot meet."""
    if run.parallel.sharding in ("stage2", "stage3"):
        raise ConfigError(
            f"sharding={run.parallel.sharding} needs all ranks to use the same weights, and a "
            "batch without pictures uses no vision tower; use stage1, or none"
        )


def _check_dropout(run: Run) -> None:
    model = run.model
    if model.lora_dropout and model.use_dora:
        raise ConfigError(
            f"lora_dropout={model.lora_dropout:g} cannot go with use_dora, which scales base and "
            "adapter together; give one of them"
        )


def _check_adapters(run: Run) -> None:
    model = run.model
    is_small = model.compute_type in FROZEN
    if model.compute_type == "fp8" and run.is_lora:
        raise ConfigError(
            "compute_type=fp8 is for weights that are all trained; use fine_tuning: Full, or wint8"
        )
    if model.quant_input_grad and model.compute_type != "fp8":
        raise ConfigError(
            f"quant_input_grad is of compute_type: fp8; this run has {model.compute_type}"
        )
    for key, is_given in (
        (f"compute_type={model.compute_type}", is_small),
        ("use_dora=true", model.use_dora),
        ("pissa=true", model.pissa),
        ("lora_target_modules", bool(model.lora_target_modules)),
        (f"lora_dropout={model.lora_dropout:g}", bool(model.lora_dropout)),
    ):
        if is_given and not run.is_lora:
            raise ConfigError(f"{key} is for frozen weights beside adapters; use fine_tuning: LoRA")
    if model.use_dora and model.pissa:
        raise ConfigError(
            "use_dora and pissa both say how an adapter stands beside its base; give one of them"
        )
    if model.qlora_weight_double_quant and model.compute_type != "nf4":
        raise ConfigError(
            f"qlora_weight_double_quant is of compute_type: nf4; this run has {model.compute_type}"
        )
    if is_small and run.parallel.sharding in ("stage2", "stage3"):
        raise ConfigError(
            f"sharding={run.parallel.sharding} cuts weights that can be gathered; with "
            f"compute_type={model.compute_type} use stage1, or none"
        )


def _check_preferences(run: Run) -> None:
    p, data = run.preferences, run.data
    is_free = p.reference_free or ("loss_type" in run.stage.settings and not p.loss.uses_reference)
    compares = run.stage.has_rollouts or (run.stage.sums_log_probs and not is_free)
    if run.model.cpu_products != "float32" and compares:
        raise ConfigError(
            f"cpu_products={run.model.cpu_products} is for passes with gradients: policy and "
            f"reference, which stage={run.model.stage} compares, would be computed differently; "
            "give cpu_products: float32"
        )
    if p.reference_free and p.ref_model_update_steps > 0:
        raise ConfigError(
            f"ref_model_update_steps={p.ref_model_update_steps} updates a reference that "
            "reference_free=True does without; leave one of them out"
        )
    if data.max_seq_len < 16:
        raise ConfigError(f"max_seq_len={data.max_seq_len} is too small for pairs; give 16 or more")
    for key, value in (
        ("split_multi_turn", data.split_multi_turn),
        ("padding", data.padding),
        ("num_nextn_predict_layers", run.model.num_nextn_predict_layers),
    ):
        if value:
            raise ConfigError(
                f"{key}={value} is not for judged answers (stage: {run.model.stage}); leave it out"
            )


def _check_policy(run: Run) -> None:
    p, data = run.policy, run.data
    if len(p.reward) != len(p.reward_weights):
        raise ConfigError(
            f"reward and reward_weights have {len(p.reward)} and {len(p.reward_weights)} entries; "
            "give one weight for each reward"
        )
    if p.normalize_rewards and p.advantage_std:
        raise ConfigError(
            "normalize_rewards=True has no effect with advantage_std=True, which divides by the "
            "deviation of each group after it; give advantage_std: false, or leave it out"
        )
    if p.policy_loss == "none" and not p.upo_mu:
        raise ConfigError("policy_loss=none and upo_mu=0 leave nothing to train; give one of them")
    if p.pair_dataset_path and not p.upo_mu:
        raise ConfigError("pair_dataset_path has no effect with upo_mu=0; leave it out")
    if p.pair_dataset_path and len(p.pair_dataset_path) != len(p.pair_dataset_type):
        raise ConfigError(
            f"pair_dataset_type and _path have {len(p.pair_dataset_type)} and "
            f"{len(p.pair_dataset_path)} entries; give one of each per file"
        )
    steps = p.num_mini_batches * run.training.gradient_accumulation_steps
    if p.prompts_per_round < steps:
        raise ConfigError(
            f"prompts_per_round={p.prompts_per_round} cannot be cut into {steps} batches "
            "(num_mini_batches x gradient_accumulation_steps); give more prompts"
        )
    files, sizes = len(data.train_dataset_path), p.curriculum_files
    if sizes and sum(sizes) != files:
        raise ConfigError(
            f"curriculum_files={list(sizes)} must count each of the {files} training files once; "
            f"it counts {sum(sizes)}"
        )
    for end, size in zip(itertools.accumulate(sizes), sizes):
        if size > 1 and not any(data.train_dataset_prob[end - size : end]):
            raise ConfigError(
                f"train_dataset_prob={list(data.train_dataset_prob)} leaves nothing of files "
                f"{end - size + 1} to {end}, a phase of curriculum_files; give one a weight above 0"
            )
    shares, phases = p.curriculum_shares, len(sizes) or files
    if shares and (len(shares) != phases or min(shares) <= 0):
        raise ConfigError(
            f"curriculum_shares={list(shares)} must be a share above 0 for each of the {phases} "
            f"{'phases of curriculum_files' if sizes else 'training files'}"
        )
    if data.max_seq_len <= p.max_completion_length:
        raise ConfigError(
            f"max_completion_length={p.max_completion_length} leaves no room for a prompt in "
            f"max_seq_len={data.max_seq_len}; give a larger max_seq_len"
        )


def _check_loss_type(p: Preferences) -> None:
    """What a form of the loss on pairs cannot go with."""
    if p.label_smoothing and not p.loss.smooths_labels:
        raise ConfigError(
            f"label_smoothing={p.label_smoothing:g} is not part of loss_type={p.loss_type}; leave "
            f"it out, or use {listed(SMOOTHING)}"
        )
    if p.loss.has_sft and p.sft_loss_ratio not in (0, 1):
        raise ConfigError(
            f"sft_loss_ratio={p.sft_loss_ratio:g} contradicts loss_type={p.loss_type}, where it is "
            "1; use loss_type: or"
        )
    if not p.loss.uses_reference and p.ref_model_update_steps > 0:
        raise ConfigError(
            f"ref_model_update_steps={p.ref_model_update_steps} updates a reference that "
            f"loss_type={p.loss_type} does without; leave it out"
        )


def _check_safety(run: Run) -> None:
    """What keeps a run safe: the best checkpoint, the average, spikes, the last step."""
    training = run.training
    if training.load_best_model_at_end:
        every = training.eval_steps or 500
        strategy = training.evaluation_strategy
        if strategy == "no" or not run.data.files("eval") or not training.do_eval:
            raise ConfigError(
                "load_best_model_at_end needs evaluations to choose by; give evaluation_strategy: "
                "steps and eval_dataset_path"
            )
        is_between = strategy == "steps" and training.save_steps % every
        if strategy != training.save_strategy or is_between:
            raise ConfigError(
                f"load_best_model_at_end chooses among checkpoints that were evaluated; with "
                f"evaluation_strategy={strategy} (eval_steps={every}) and "
                f"save_strategy={training.save_strategy} (save_steps={training.save_steps}) some "
                "are not: give one strategy, and save_steps a multiple of eval_steps"
            )
    if 0 < training.max_grad_spike <= 1:
        raise ConfigError(
            f"max_grad_spike={training.max_grad_spike:g} would skip every other step; give a "
            "factor above 1, like 10, or 0"
        )
    if training.max_grad_spike and run.optimisation.optimizer_in_backward:
        raise ConfigError(
            "max_grad_spike needs the gradient's norm before the first update, which "
            "optimizer_in_backward does not have; give only one of them"
        )


def _check_indexed(run: Run) -> None:
    data = run.data
    if run.stage.sample != "document":
        raise ConfigError(
            f"input_dir holds documents, which stage={run.model.stage} cannot read; use stage: PT"
        )
    if data.train_dataset_path or data.eval_dataset_path:
        raise ConfigError(
            "input_dir has its own documents for training and evaluation (split); leave "
            "train_dataset_path and eval_dataset_path out"
        )
    if not 1 <= len(data.split) <= 3 or not data.split[0]:
        raise ConfigError(
            f"split={list(data.split)} must be one to three shares, the first above 0, as in 950,50"
        )
    weights = [weight for _, _, weight in data.files("train")]
    if min(weights, default=0) < 0 or sum(weights) <= 0:
        raise ConfigError(f"input_dir={data.input_dir!r} must have weights of 0 or more")


def _check_sources(run: Run, split: str) -> None:
    data, sample = run.data, run.stage.sample
    kinds, paths, probs = (getattr(data, f"{split}_dataset_{x}") for x in ("type", "path", "prob"))
    if paths and not len(kinds) == len(paths) == len(probs):
        raise ConfigError(
            f"{split}_dataset_type, _path and _prob have {len(kinds)}, {len(paths)} and "
            f"{len(probs)} entries; give one of each per file"
        )
    known = FORMATS[sample]
    for kind in kinds:
        if kind not in known and (paths or kind != "pretrain"):
            raise ConfigError(
                f"{split}_dataset_type={kind!r} is not known for stage {run.model.stage}; use "
                f"{listed(kind for kind in known if kind != 'chatml')}"
            )
    texts = [p for p in paths if p.removesuffix(".gz").endswith(".txt")]
    if texts and sample != "document":
        raise ConfigError(f"{texts[0]} is plain text, which only stage PT reads; give .jsonl files")
    if paths and sum(probs) <= 0:
        raise ConfigError(f"{split}_dataset_prob={list(probs)} are all 0; give one above 0")
