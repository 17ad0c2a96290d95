"""Settings of training: steps and checkpoints, the optimizer, and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ernie.settings import option


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length of the run, and what happens when."""

    output_dir: str | None = option(
        "./output",
        "Folder of checkpoints, metrics and the final model; none only to serve.",
        path=True,
    )
    overwrite_output_dir: bool = option(
        False, "Start anew and remove earlier checkpoints; otherwise the newest is resumed."
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to resume instead of the newest one of output_dir.", path=True
    )
    ignore_changed_inputs: bool = option(
        False,
        "Resume although training files, tokenizer, template, model_name_or_path or the base of an "
        "adapter are others.",
    )
    do_train: bool = option(True, "Train (false: only evaluate).")
    do_eval: bool = option(
        True, "Evaluate while training, where evaluation_strategy says when (false: never)."
    )
    seed: int = option(42, "Seed of data order, new weights and rounding.", least=0, most=2**32 - 1)
    device: str = option("auto", "cpu, gpu (or cuda); auto takes a GPU where there is one.")
    plan_memory_gib: float | None = option(
        None,
        "GiB of memory for a rank, which `erniekit plan` holds a run against and "
        "recompute_granularity auto fills; none: this machine's, of which auto leaves a tenth.",
        above=0,
        most=1e6,
    )
    batch_size: int = option(1, "Packed rows in one forward pass.", least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes of one optimizer step.", least=1)
    num_train_epochs: float = option(1.0, "Passes over the data, where max_steps is -1.", above=0)
    max_steps: int = option(
        -1, "Optimizer steps; -1: found by packing the data once.", least=1, also=-1
    )
    logging_steps: int = option(
        1, "A log line every so many steps; metrics.jsonl has every step.", least=1
    )
    evaluation_strategy: str = option(
        "no", "Evaluate every eval_steps, every epoch or never.", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = option(None, "Steps between evaluations; none: every 500.", least=1)
    max_evaluate_steps: int = option(
        -1, "Batches of an evaluation; -1: all of them.", least=1, also=-1
    )
    save_strategy: str = option(
        "steps", "Save every save_steps, every epoch or only at the end.",
        choices=("no", "steps", "epoch"),
    )  # fmt: skip
    save_steps: int = option(500, "Steps between checkpoints.", least=1)
    save_total_limit: int | None = option(
        None, "Checkpoints kept, the best one among them; none: all.", least=1
    )
    use_async_save: bool = option(
        False,
        "Write checkpoints from a copy in host memory while training goes on; also async_save in "
        "unified_checkpoint_config.",
    )
    load_best_model_at_end: bool = option(
        False, "Make the final model from the best checkpoint instead of the last step."
    )
    metric_for_best_model: str | None = option(
        None, "Number of an evaluation that the best checkpoint is best by; none: eval_loss."
    )
    greater_is_better: bool | None = option(
        None,
        "Whether that number shall be high; none: low for names that end in loss or ppl.",
    )
    use_checkpoint: str | None = option(
        None,
        "What eval, export and server take of output_dir: best, newest, ema (averaged weights of "
        "the final model), checkpoint-40 or another folder; none: the final model, else the newest "
        "checkpoint.",
        path=True,
    )
    stop_after_step: int | None = option(
        None,
        "Save and stop after this step, as SIGTERM does; schedules are those of max_steps.",
        least=1,
    )
    max_grad_spike: float = option(
        0.0,
        "A step whose gradient norm is above so many times the median of recent ones is skipped; "
        "0: never.",
        least=0,
    )
    grad_spike_window: int = option(
        64, "Recent steps of that median, which needs 10 to begin.", least=1
    )
    max_skipped_steps: int = option(
        10, "Steps skipped as not finite or as a spike, before training stops.", least=0
    )

    def interval(self, strategy: str, steps: int, num_steps: int) -> int:
        """Steps between two events of a strategy, in a run of `num_steps`; 0 for never."""
        if strategy == "epoch":
            return max(round(num_steps / self.num_train_epochs), 1)
        return steps if strategy == "steps" else 0


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Learning rate, optimizer and the precision of what it remembers."""

    learning_rate: float = option(5e-5, "Peak learning rate.", least=0)
    min_lr: float = option(0.0, "Floor of the schedule.", least=0)
    lr_scheduler_type: str = option(
        "linear",
        "Shape after warm-up: linear, cosine, constant, constant_with_warmup, polynomial, or "
        "wsd:<step until which it is steady> (wsd alone: 0.9 of the steps). Also lr_scheduler.",
    )
    decay_function: str = option(
        "half_life", "Decay of wsd: half_life or 1-sqrt.", choices=("half_life", "1-sqrt")
    )
    warmup_steps: int = option(0, "Linear warm-up, in steps.", least=0)
    warmup_ratio: float = option(0.0, "Linear warm-up as a share of max_steps.", least=0, most=1)
    decay_steps: int | None = option(
        None, "Steps until min_lr is reached; none: max_steps.", least=1
    )
    num_cycles: float = option(0.5, "Cosine waves of the cosine schedule.", least=0)
    lr_end: float = option(1e-7, "Last learning rate of the polynomial schedule.", least=0)
    power: float = option(1.0, "Exponent of the polynomial schedule.", above=0)
    optim: str = option(
        "adamw",
        "Optimizer: adamw (also adamw_custom), adamw_8bit (moments of one byte), or muon for "
        "matrices with adamw for the rest.",
        choices=("adamw", "adamw_custom", "adamw_8bit", "muon"),
    )
    muon_momentum: float = option(0.95, "Decay of muon's mean of gradients.", least=0, below=1)
    optimizer_in_backward: bool = option(
        False,
        "Update each weight, and free its gradient, the moment it is known; needs "
        "max_grad_norm: 0 and gradient_accumulation_steps: 1.",
    )
    offload_optim: bool = option(
        False,
        "Keep what the optimizer remembers (but averages) in the host's memory, and each weight's "
        "on the GPU only for its update; also tensorwise_offload_optimizer. Nothing on a CPU.",
    )
    adam_beta1: float = option(0.9, "Decay of the mean of gradients.", least=0, below=1)
    adam_beta2: float = option(0.999, "Decay of the mean of squared gradients.", least=0, below=1)
    adam_epsilon: float = option(1e-8, "Added to the root of the mean square.", above=0)
    hidden_dropout_prob: float = option(
        0.0,
        "Share of the outputs of attention and feed-forward that is dropped while training: layer "
        "l of L (from 0) drops l / L of it.",
        least=0,
        below=1,
    )
    attention_probs_dropout_prob: float = option(
        0.0,
        "The same of attention weights, which then take the slow way through plain torch.",
        least=0,
        below=1,
    )
    dropout_warmup_steps: int = option(0, "Steps over which these two rise from 0.", least=0)
    weight_decay: float = option(
        0.0, "Decoupled decay of matrices; never of norms and biases.", least=0
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never.", least=0)
    ema_decay: float = option(
        0.0,
        "Keep a running average of the trained weights, of this decay a step, in float32; 0: none.",
        least=0,
        below=1,
    )
    layerwise_lr_decay_bound: float = option(
        1.0,
        "Learning rate factor of the embedding and the lowest layer, rising linearly with the "
        "layers; 1 at the head, which is three steps above the uppermost one.",
        least=0,
        most=1,
    )
    moe_gate_lr_ratio: float | None = option(None, "Learning rate factor of the routers.", least=0)
    vit_lr_ratio: float | None = option(None, "Learning rate factor of the vision tower.", least=0)
    visual_ld: float | None = option(
        None,
        "The same by depth: this once more for each block of the tower from the top down.",
        least=0,
    )
    amp_master_grad: bool | None = option(
        None,
        "Sum gradients in float32 (true) or bfloat16 (false). none: float32 for LoRA and on a "
        "GPU; bfloat16 for Full on a CPU, except the vocabulary's.",
    )
    use_lowprecision_moment: bool | None = option(
        None,
        "Keep AdamW's moments in bfloat16, rounded at random without bias. none: only for Full "
        "on a CPU, where it saves 4 bytes a weight.",
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Several processes: how many, and what is divided among them (docs/parallelism.md)."""

    nproc_per_node: int | None = option(
        None,
        "Processes to start on this machine; none: one for each visible GPU, one on a CPU.",
        least=1,
    )
    sharding: str | None = option(
        None,
        "What each rank holds a part of: nothing (none), the optimizer's state (stage1), gradients "
        "too (stage2), weights too (stage3).",
        choices=(None, "stage1", "stage2", "stage3"),
    )
    sharding_parallel_degree: int = option(
        -1,
        "Ranks over which one copy is divided; -1: all that data_parallel_degree leaves.",
        least=1,
        also=-1,
    )
    data_parallel_degree: int = option(
        -1,
        "Copies; -1: what sharding leaves. Every rank of every copy has its own batches.",
        least=1,
        also=-1,
    )
    ddp_timeout: int = option(
        1800, "Seconds that a rank waits for another before all stop, naming it.", least=1
    )


SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "wsd")
