"""ERNIEKit's published example files for text, rebuilt key by key: they are read and planned.

Files are blocks: what all supervised ones share, what a size or method changes. Paths, models and
numbers are those of the published files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ernie.settings import read_yaml
from erniekit import foreign
from erniekit.plan import plan
from erniekit.plan_report import DEGREES, PLANNED_AS, read_plannable

SHARED = {
    "train_dataset_type": "erniekit",
    "eval_dataset_type": "erniekit",
    "train_dataset_path": "examples/data/sft-train.jsonl",
    "eval_dataset_path": "examples/data/sft-eval.jsonl",
    "train_dataset_prob": "1.0",
    "eval_dataset_prob": "1.0",
    "stage": "SFT",
    "seed": 23,
    "do_train": True,
    "do_eval": True,
    "dataloader_num_workers": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "max_evaluate_steps": 10000,
    "evaluation_strategy": "steps",
    "save_strategy": "steps",
    "logging_steps": 1,
    "release_grads": True,
    "disable_tqdm": True,
    "logging_dir": "./vdl_log",
    "output_dir": "./output",
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "adam_epsilon": 1e-8,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "sharding": "stage1",
    "recompute_use_reentrant": True,
    "fp16_opt_level": "O2",
    "amp_master_grad": True,
    "disable_ckpt_quant": True,
    "unified_checkpoint": True,
    "amp_custom_white_list": [
        "lookup_table", "lookup_table_v2", "flash_attn", "matmul", "matmul_v2",
        "fused_gemm_epilogue",
    ],
    "amp_custom_black_list": [
        "reduce_sum", "softmax_with_cross_entropy", "c_softmax_with_cross_entropy",
        "elementwise_div", "sin", "cos",
    ],
    "fuse_rope": True,
    "use_sparse_head_and_loss_fn": True,
}  # fmt: skip
SMALL = {
    "max_seq_len": 8192,
    "model_name_or_path": "baidu/ERNIE-4.5-0.3B-Paddle",
    "fine_tuning": "Full",
    "max_steps": -1,
    "eval_steps": 100,
    "save_steps": 100,
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "optim": "adamw_custom",
    "tensorwise_offload_optimizer": True,
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "pipeline_parallel_config": "enable_delay_scale_loss enable_release_grads "
    "disable_partial_send_recv",
    "recompute": False,
    "compute_type": "bf16",
    "unified_checkpoint_config": "ignore_merge_optimizer",
}
LORA = {
    "fine_tuning": "LoRA",
    "lora_rank": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "pipeline_parallel_config": "disable_partial_send_recv enable_clear_every_step_cache",
}
MIXED_BITS = {
    "fine_tuning": "LoRA",
    "lora_rank": 32,
    "num_samples_each_epoch": 6000000,
    "distributed_dataloader": False,
    "max_steps": 100,
    "eval_steps": 10000,
    "save_steps": 10000000,
    "save_total_limit": 5,
    "learning_rate": 3e-4,
    "min_lr": 0,
    "layerwise_lr_decay_bound": 1.0,
    "weight_decay": 0.01,
    "offload_optim": True,
    "sharding_parallel_degree": 1,
    "sequence_parallel": True,
    "unified_checkpoint_config": "async_save",
    "compute_type": "wint4/8",
}
DPO = {
    "train_dataset_path": "examples/data/dpo-train.jsonl",
    "eval_dataset_path": "examples/data/dpo-eval.jsonl",
    "num_samples_each_epoch": 6000000,
    "mix_strategy": "random",
    "packing": True,
    "stage": "DPO",
    "seed": 42,
    "distributed_dataloader": True,
    "dataloader_num_workers": 4,
    "max_steps": 800,
    "eval_steps": 20000,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 5,
    "gradient_accumulation_steps": 36,
    "warmup_steps": 50,
    "learning_rate": 5e-7,
    "min_lr": 5e-7,
    "layerwise_lr_decay_bound": 0.5,
    "attention_probs_dropout_prob": 0.1,
    "dropout_warmup_steps": 100,
    "offset_alpha": 0,
    "scale_loss": 8192,
    "weight_decay": 0.1,
    "offload_optim": True,
    "use_sp_callback": True,
    "tensor_parallel_config": "sync_param sync_grad sync_moment",
    "sequence_parallel": True,
    "pipeline_parallel_config": "disable_partial_send_recv enable_clear_every_step_cache "
    "enable_delay_scale_loss enable_overlap_p2p_comm best_unbalanced_scheduler",
    "unified_checkpoint_config": "async_save",
}
DPO_LORA = {
    "fine_tuning": "LoRA",
    "lora_rank": 32,
    "lora_alpha": 128,
    "lora_plus_scale": 12,
    "rslora": True,
}
PT = {
    "train_dataset_path": "examples/data/pt-train.jsonl",
    "eval_dataset_path": "examples/data/pt-eval.jsonl",
    "stage": "PT",
    "max_steps": 100,
    "min_lr": 1e-6,
    "offload_optim": True,
    "unified_checkpoint_config": "async_save",
}
LARGE = {
    "model_name_or_path": "baidu/ERNIE-4.5-21B-A3B-Paddle",
    "moe_group": "mp",
    "use_sp_callback": True,
    "sequence_parallel": True,
    "recompute": True,
}
LARGE_DPO = {
    "gradient_accumulation_steps": 8,
    "layerwise_lr_decay_bound": 1.0,
    "recompute": False,
}


def cut(tensor: int, pipeline: int) -> dict[str, int]:
    return {"tensor_parallel_degree": tensor, "pipeline_parallel_degree": pipeline}


FILES: dict[str, list[dict[str, Any]]] = {
    "0.3B/pt/run_pt_8k": [SMALL, PT],
    "21B-A3B/fc/run_fc_8k": [
        SMALL, LARGE, cut(4, 2),
        {"max_steps": 10, "train_dataset_type": "chatml", "eval_dataset_type": "chatml"},
    ],
    "21B-A3B-Thinking/sft/run_sft_8k": [
        SMALL, LARGE, cut(4, 2),
        {"max_steps": 100, "split_multi_turn": True, "train_dataset_type": "messages",
         "eval_dataset_type": "messages",
         "model_name_or_path": "baidu/ERNIE-4.5-21B-A3B-Thinking-Paddle"},
    ],
}  # fmt: skip
for length, name in ((8192, "8k"), (32768, "32k"), (131072, "128k")):
    longer = {"max_seq_len": length, "recompute": length > 8192}
    wide = {"max_seq_len": length} | (cut(4, 1) if length == 131072 else cut(2, 1))
    FILES |= {
        f"0.3B/sft/run_sft_{name}": [SMALL, longer],
        f"0.3B/sft/run_sft_lora_{name}": [SMALL, LORA, longer],
        f"0.3B/sft/run_sft_wint8mix_lora_{name}": [SMALL, MIXED_BITS, longer],
        f"0.3B/dpo/run_dpo_{name}": [SMALL, DPO, longer],
        f"0.3B/dpo/run_dpo_lora_{name}": [SMALL, DPO, DPO_LORA, longer],
        f"21B-A3B/sft/run_sft_{name}": [SMALL, LARGE, wide],
        f"21B-A3B/sft/run_sft_lora_{name}": [SMALL, LARGE, LORA, wide],
        f"21B-A3B/sft/run_sft_wint8mix_lora_{name}": [SMALL, LARGE, MIXED_BITS, wide],
        f"21B-A3B/dpo/run_dpo_{name}": [SMALL, LARGE, DPO, LARGE_DPO, wide, cut(4, 2)],
        f"21B-A3B/dpo/run_dpo_lora_{name}": [
            SMALL, LARGE, DPO, LARGE_DPO, DPO_LORA, wide, cut(1, 1),
            {"fuse_linear": True, "recompute": True},
        ],
    }  # fmt: skip
DIVIDES = {key for keys in DEGREES.values() for key in keys}


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_and_planned(name: str) -> None:
    """Every key is a setting with the value of the file, a degree of the plan, or one that is told
    to have no effect.
    """
    values = dict(SHARED)
    for block in FILES[name]:
        values |= block
    run, degrees, notes = read_plannable(values, name)
    assert degrees.tensor == values["tensor_parallel_degree"]
    assert degrees.pipeline == values["pipeline_parallel_degree"]
    known = run.flat() | {"tensorwise_offload_optimizer": run.optimisation.offload_optim}
    assert run.training.use_async_save is (values.pop("unified_checkpoint_config") == "async_save")
    for key, value in values.items():
        if key in PLANNED_AS or key in DIVIDES or key in run.without_effect:
            continue
        assert told(known[key]) == told(value), f"{key} is {known[key]!r}, not {value!r}"
    found = plan(run, "cuda", degrees)
    assert 0 < found.parts["weights"] < found.peak
    for note in notes:  # what is not trained as it stands
        assert any(key in note for key in (*DIVIDES, *PLANNED_AS, "reads every pair")), note


VL = Path(__file__).parents[2] / "examples/configs/ERNIE-4.5-VL-28B-A3B"


@pytest.mark.parametrize("path", sorted(VL.glob("*/*.yaml")), ids=lambda path: path.name)
def test_published_files_about_pictures_are_read_and_planned(path: Path) -> None:
    """As above, with the published degrees; what is not a setting is told to have no effect."""
    values = read_yaml(path) | {"tensor_parallel_degree": 4, "pipeline_parallel_degree": 2}
    run, degrees, notes = read_plannable(dict(values), path.name)
    known = run.flat() | {"tensorwise_offload_optimizer": run.optimisation.offload_optim}
    assert known["packing"] is False and known["max_seq_len"] == values["pad_to_max_seqlen"]
    renamed = ("one_sample_in_one_seq", "pad_to_max_seqlen", "unified_checkpoint_config")
    for key, value in values.items():
        if key in (*DIVIDES, *run.without_effect, *renamed, *foreign.NEUTRAL) or not value:
            continue
        value = value.strip("[]").split(",") if key == "modality_ratio" else value
        assert told(known[key]) == told(value), f"{key} is {known[key]!r}, not {value!r}"
    found = plan(run, "cuda", degrees)
    thawed = dataclasses.replace(run.model, freeze_config=())
    full = plan(dataclasses.replace(run, model=thawed), "cuda", degrees)
    assert 0 < found.parts["weights"] < found.peak
    if run.model.freeze_config:
        assert full.num_trained - found.num_trained > 6e8, "the tower, or the language model"
        assert full.parts["activations"] >= found.parts["activations"]
    assert all(any(key in note for key in DIVIDES) for note in notes), notes


def told(value: Any) -> Any:
    """A number, a switch or a text, of whatever type a file has it in."""
    if isinstance(value, (list, tuple)):
        return told(value[0]) if len(value) == 1 else [told(v) for v in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
