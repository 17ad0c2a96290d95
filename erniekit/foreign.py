"""ERNIEKit's keys that are not settings here: accepted without effect, or refused by name.

`WITHOUT_EFFECT`: keys that steer PaddlePaddle (its fused kernels, launch, memory pools,
file formats) or that describe what always happens here; any value is accepted and the run reports
them in one line. `NEUTRAL`: keys of features that are not here yet; they are accepted at the values
that switch the feature off, and refused otherwise in a sentence that says so; `INSTEAD` has what
to give in their place. `ELSEWHERE` are names that other trainers have for settings here: told, not
taken, for their values may mean something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ernie.settings import ConfigError, as_word, coerce, did_you_mean

# What happens instead, by key; the reason is for the reader of this table and of the docs.
WITHOUT_EFFECT: dict[str, str] = {
    # always done here
    "release_grads": "gradients are always released after a step",
    "use_sparse_head_and_loss_fn": "the head always sees only trained tokens",
    "use_fused_head_and_loss_fn": "head and loss are always one chunked pass",
    "use_recompute_loss_fn": "logits are never kept",
    "use_attn_mask_start_row_indices": "attention always takes segment bounds",
    "use_attn_mask_startend_row_indices": "attention always takes segment bounds",
    "use_sparse_flash_attn": "segments never meet each other",
    "encode_one_turn": "turns are always encoded by themselves",
    "save_rng_states": "always saved",
    "save_tokenizer": "always saved",
    "logging_strategy": "logging_steps decides; metrics.jsonl has every step",
    "logging_first_step": "logging_steps decides; metrics.jsonl has every step",
    "log_global_grad_norm": "every step has the norm of all gradients",
    "enable_global_training_logs": "every step has the numbers of all processes",
    "global_logging_interval": "every step has the numbers of all processes",
    "record_optimizer_stat": "metrics.jsonl has what is recorded",
    # PaddlePaddle's kernels and precision machinery
    "use_flash_attention": "ernie.kernels picks",
    "use_flash_attn_with_mask": "ernie.kernels picks",
    "use_mem_eff_attn": "ernie.kernels picks",
    "fuse_linear": "ernie.kernels picks",
    "fuse_rope": "ernie.kernels picks",
    "fuse_softmax_mask": "ernie.kernels picks",
    "fuse_rms_norm": "ernie.kernels picks",
    "fuse_swiglu": "ernie.kernels picks",
    "fuse_gate_detach_matmul": "ernie.kernels picks",
    "moe_gate": "one router",
    "moe_group": "experts live in this process",
    "moe_group_experts": "one router",
    "moe_with_send_router_loss": "one process",
    "use_recompute_moe": "recompute_granularity decides",
    "use_recompute_mtp": "recompute_granularity decides",
    "recompute_use_reentrant": "one way of recomputing",
    "offload_recompute_inputs": "inputs stay where they are",
    "bf16": "compute_type decides",
    "fp16": "compute_type decides",
    "fp16_opt_level": "compute_type decides",
    "scale_loss": "only float16 needs it",
    "amp_custom_white_list": "precision is per kernel",
    "amp_custom_black_list": "precision is per kernel",
    "weight_quantize_algo": "compute_type decides",
    # pictures
    "multimodal": "the model's config.json decides",
    "use_moe": "the model's config.json decides",
    "moe_use_hard_gate": "tokens always go to the experts of their kind",
    "moe_multimodal_dispatch_use_allgather": "experts live in this process",
    "variable_resolution": "pictures always keep their proportions",
    "spatial_conv_size": "the model's config.json decides",
    "im_prefix_length": "pictures have as many tokens as they need",
    "image_token_len": "pictures have as many tokens as they need",
    "serialize_output": "samples are never written",
    "drop_untrainble_sample": "samples without a trained token are always left out and told",
    "add_sys_token": "the chat template decides",
    "drop_history_with_k": "a dialogue is trained as it is in the data",
    "min_shot": "a dialogue is trained as it is in the data",
    "max_shot": "a dialogue is trained as it is in the data",
    "example_from_same_task_prob": "a dialogue is trained as it is in the data",
    "pseudo_sampling_prob": "a dialogue is trained as it is in the data",
    "trigger_data_prob": "a dialogue is trained as it is in the data",
    "same_data": "a resumed run goes on in its data",
    "sampling_wo_replacement_data_resuming": "a resumed run goes on in its data",
    "use_train_part_sharding": "every rank reads all files",
    "text_use_train_part_sharding": "every rank reads all files",
    "modality_interleave": "records are mixed by modality_ratio",
    "balanced_image_preprocess": "batches are always dealt by their patches",
    "vit_second_fwd_batch_size": "long videos pass the tower in pieces",
    # memory management of PaddlePaddle
    "optim_shard_num": "one optimizer file",
    "pre_alloc_memory": "torch manages memory",
    "gc_interval": "Python collects",
    # one division, by `sharding` and its degrees
    "sharding_parallel_config": "one process",
    "sharding_comm_buffer_size_MB": "one process",
    "tensor_parallel_config": "one process",
    "tensor_parallel_output": "one process",
    "pipeline_parallel_config": "one process",
    "data_parallel_config": "one process",
    "sequence_parallel_config": "one process",
    "hybrid_parallel_topo_order": "one process",
    "sequence_parallel": "one process",
    "use_sp_callback": "one process",
    "pp_seg_method": "one process",
    "add_tail_layers": "one process",
    "distributed_dataloader": "one process",
    "pp_need_data": "one process",
    "pp_need_data_degree": "one process",
    "disable_pipeline_warmup": "one process",
    "enable_mtp_magic_send": "one process",
    "fuse_sequence_parallel_allreduce": "one process",
    "tensor_fusion": "one process",
    # PaddlePaddle's checkpoint formats
    "unified_checkpoint": "one checkpoint format",
    "unified_checkpoint_config": "one checkpoint format",
    "disable_ckpt_quant": "checkpoints are never quantised",
    "ckpt_quant_stage": "checkpoints are never quantised",
    "zcc_workers_num": "one thread writes",
    "zcc_pipeline_hooks_capacity_usage": "one process",
    "ordered_save_group_size": "one process",
    "save_sharding_stage1_model_include_freeze_params": "one process",
    "save_sharded_model": "one checkpoint format",
    "load_sharded_model": "one checkpoint format",
    "save_checkpoint_format": "one checkpoint format",
    "convert_from_hf": "the layout is recognised",
    "save_to_hf": "the layout of the base model is kept",
    "use_huggingface_model": "the layout is recognised",
    "output_signal_dir": "Baidu's cluster",
    "args_output_to_local": "run.yaml has them",
    "hf_hub_id": "nothing is uploaded",
    "run_name": "output_dir names a run",
    "mergekit_task_config": "unused by ERNIEKit too",
    # leftovers of other stages and of ERNIEKit itself
    "num_comparisons": "unused by ERNIEKit too",
    "use_cls": "unused by ERNIEKit too",
    "in_tokens_batching": "packing decides",
    "dataset_name": "the type of each file decides",
    "eval_iters": "max_evaluate_steps decides",
    "offset_alpha": "every pair differs by a score of 1, whose logarithm is 0",
    "num_of_gpus": "nothing is estimated from it",
    "global_batch_size": "batch_size x gradient_accumulation_steps",
    "sft_benchmark": "metrics.jsonl has the speed of every step",
    "from_scratch": "continue_training decides",
    "rope_3d": "the model's config.json decides",
    "vision_config": "the model's config.json decides",
    "max_position_embeddings": "the model's config.json decides",
    "bos_token_id": "the tokenizer decides",
    "eos_token_id": "the tokenizer decides",
    "metrics_port": "metrics are served on port",
    "engine_worker_queue_port": "the server has one port",
    "use_warmup": "the server decides",
    "kv_cache_ratio": "the server decides",
    "load_choices": "the layout is recognised",
    "stream_options": "usage is always asked for",
    # FP8 with one scale for a whole tensor
    "apply_hadamard": "every row has a scale of its own, which outliers elsewhere do not touch",
    "hadamard_block_size": "nothing is rotated",
    "apply_online_actscale_step": "scales are those of the values at hand",
    "actscale_moving_rate": "scales are those of the values at hand",
    "fp8_format_type": "gradients have scales of their own, and the finer format",
    "fp8_force_clear_state": "nothing is kept between steps",
    "enable_fp8_quantize_analysis": "metrics.jsonl has what is recorded",
}

# Key -> values that mean "off". Empty strings, none and lists thereof are always off.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_degree": (-1, 1),
    "tensor_model_parallel_size": (-1, 1),
    "pipeline_parallel_degree": (-1, 1),
    "pipeline_model_parallel_size": (-1, 1),
    "sharding_parallel_size": (-1, 1),
    "expert_parallel_degree": (-1, 1),
    "expert_model_parallel_size": (-1, 1),
    "context_parallel_degree": (-1, 1),
    "context_parallel_size": (-1, 1),
    "sep_parallel_degree": (-1, 1),
    "virtual_pp_degree": (1,),
    "server_tp_degree": (-1, 1),
    "use_expert_parallel": (False,),
    "refined_recompute": (),
    "use_global_causal_attn": (False,),
    "use_template": (True,),
    "dataset_type": ("iterable", "pretrain"),
    "offline_dataset_path": (),
    "truncation_strategy": ("left",),
    "moe_dropout_prob": (0,),
    "moe_use_aux_free": (True,),
    "adaptive_norm_clip": (False,),
    "train_emb_only": (0, False),
    "train_moe_only": (),
    "do_predict": (False,),
    "zcc_ema_interval": (1,),
    "flash_device_save_steps": (0,),
    "ignore_data_skip": (False,),
    "skip_data_intervals": (),
    "ignore_save_lr_and_optim": (False,),
    "ignore_load_lr_and_optim": (False,),
    "dpo_benchmark": (False,),
    "reshard_save_then_exit": (False,),
    "load_args_from_api": (False,),
    "dataloader_drop_last": (False,),
    "data_filelist": (),
    "data_weights": (),
    "tokenizer": (),
    "tokenizer_name": (),
    "corpus_name": (),
    "prompt_dir": ("./",),
    "sft_shift_by_one": (False,),
    "quant_weight_grad": (False,),
    "use_fp8": (False,),
    "vision_model_name_or_path": (),
    "use_pic_id": (True,),
    "image_dtype": ("uint8",),
    "adaptive_max_imgtoken_option": (),
    "adaptive_max_imgtoken_rate": (),
    "enable_mm": (False,),
    "quantization": (),
    "reasoning_parser": (),
    "tool_call_parser": (),
}

# What to give instead of keys of NEUTRAL at values that do not mean off.
INSTEAD = {
    "moe_use_aux_free": "moe_use_aux_free_update_coef: 0",
    "train_emb_only": "freeze_parameters: model.layers.*,model.norm.*",
    "train_moe_only": "freeze_parameters: embeddings,attention,*norm*",
}

# Keys of ERNIEKit's that are settings here under the field's usual name.
RENAMED = {
    "zcc_save_ema_coef": "ema_decay",
    "enable_zero_cost_checkpoint": "use_async_save",
    "target_modules": "lora_target_modules",  # PEFT's
    "lr_scheduler": "lr_scheduler_type",  # in its pre-training and its training on pictures
}

# Keys of ERNIEKit's that `renamed` turns into values of others.
_TURNED = (
    "use_ortho_loss_callback", "one_sample_in_one_seq", "tensorwise_offload_optimizer",
    "pad_to_max_seqlen",
)  # fmt: skip

# Names of transformers, TRL, LLaMA-Factory and PEFT, and what they are called here.
ELSEWHERE = {
    "gradient_checkpointing": "recompute",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "optimizer": "optim",
    "num_warmup_steps": "warmup_steps",
    "eval_strategy": "evaluation_strategy",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "model_max_length": "max_seq_len",
    "cutoff_len": "max_seq_len",
    "max_prompt_length": "max_prompt_len",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model_name": "model_name_or_path",
    "adapter_name_or_path": "lora_path",
    "dataset": "train_dataset_path",
    "train_file": "train_dataset_path",
    "eval_dataset": "eval_dataset_path",
    "validation_file": "eval_dataset_path",
    "finetuning_type": "fine_tuning",
    "use_peft": "fine_tuning",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "lora_target": "lora_target_modules",
    "use_rslora": "rslora",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "template": "chat_template",
    "dataloader_prefetch_factor": "prefetch_factor",
    "preprocessing_workers": "preprocessing_num_workers",
    "nproc": "nproc_per_node",
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names that settings have here; async_save is a word of another key.

    Raises ConfigError where two names of one setting have two values.
    """
    result = dict(values)
    for theirs, ours in RENAMED.items():
        if theirs in result:
            given = result.pop(theirs)
            if given in (None, ""):
                continue
            if ours in result and as_word(result[ours]).lower() != as_word(given).lower():
                raise ConfigError(f"{theirs} and {ours} are one setting; give {ours}")
            result[ours] = given
    given = result.pop("unified_checkpoint_config", None) or ()
    words = given.split() if isinstance(given, str) else list(given)
    if (is_on := _says(result, "use_ortho_loss_callback")) is not None:
        result.setdefault("moe_orthogonal_update", "decoupled_lr" if is_on else "loss")
    if (is_on := _says(result, "one_sample_in_one_seq")) is not None:
        result.setdefault("packing", not is_on)
    if (is_on := _says(result, "tensorwise_offload_optimizer")) is not None:
        result["offload_optim"] = is_on or result.get("offload_optim", False)  # two ways to it
    if size := result.pop("pad_to_max_seqlen", None):
        result.setdefault("max_seq_len", size)
    if "async_save" in words:
        result.setdefault("use_async_save", True)
        words.remove("async_save")
    return result | ({"unified_checkpoint_config": " ".join(words)} if words else {})


def _says(values: dict[str, Any], key: str) -> bool | None:
    """Yes or no, as a key says that is taken out, None where it says nothing; ConfigError for what
    is neither.
    """
    given = values.pop(key, None)
    return None if given in (None, "") else bool(coerce(given, bool, key))


def refuse_unknown(keys: Collection[str], own: Collection[str], origin: str) -> None:
    """Raise ConfigError for the first key that is neither a setting nor in a table here."""
    known = {*own, *WITHOUT_EFFECT, *NEUTRAL, *RENAMED, *_TURNED}
    for key in keys:
        if key in known:
            continue
        near = did_you_mean(key, sorted(known))
        if key in ELSEWHERE:
            near = f"; it is called {ELSEWHERE[key]!r} here"
        raise ConfigError(f"unknown key {key!r} in {origin}{near}")


def separate(
    values: Mapping[str, Any], own: Collection[str], origin: str
) -> tuple[dict[str, Any], list[str]]:
    """The values that are settings here, and the names of the keys without effect that were given.

    Raises ConfigError for unknown keys and for features that are not here.
    """
    refuse_unknown(values, own, origin)
    kept: dict[str, Any] = {}
    without_effect: list[str] = []
    for key, value in values.items():
        if key in own:
            if value is not None:
                kept[key] = value
        elif key in WITHOUT_EFFECT:
            without_effect.append(key)
        elif not _is_off(value, NEUTRAL[key]):
            usable = " or ".join(map(str, NEUTRAL[key])) or "nothing"
            if key in INSTEAD:
                raise ConfigError(f"{key}={value} is not a setting here; give {INSTEAD[key]}")
            raise ConfigError(f"{key}={value} is not available yet; leave it out or at {usable}")
    return kept, without_effect


def _is_off(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value in (None, "", [], {}) or str(value).lower() in ("none", "null"):
        return True
    return any(
        str(value).lower() in (str(n).lower(), str(float(n)) if _number(n) else "") for n in neutral
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
