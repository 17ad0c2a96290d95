"""The settings of a run: ERNIEKit's flat YAML keys as frozen dataclasses, one per subject.

A file and `key=value` words become one flat dict; keys that ERNIEKit has but that mean nothing here
are taken out and reported (`erniekit.foreign`); the rest is distributed over the groups by field
name, checked (`validate`), and every "auto" is resolved into a *new* `Run` (`resolved`). The same
fields make `--help`, the documentation tables and `run.yaml`.

Imports no torch: `erniekit --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, fill, option, read_overrides, read_yaml
from erniekit import foreign

# Names of the published files; `erniekit.launch` refuses those that cannot be trained yet.
STAGES = ("SFT", "DPO", "KTO", "RM", "UPO", "PT", "VL-SFT", "OCR-VL-SFT")
PICTURED = ("VL-SFT", "DPO", "KTO", "RM")  # those that read pictures, where the model does


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and what of it is trained."""

    model_name_or_path: str = option(
        "", "Folder of a saved model (-PT or -Paddle layout), or its name on the hub."
    )
    stage: str = option("SFT", "What kind of training.", choices=STAGES)
    fine_tuning: str = option(
        "LoRA", "Train small adapters beside frozen weights, or all.", choices=("LoRA", "Full")
    )
    lora: bool | None = option(None, "Older spelling of fine_tuning: true is LoRA, false Full.")
    lora_rank: int = option(8, "Rank of the adapters.")
    lora_alpha: float = option(-1, "Adapter scale is alpha / rank; -1: 2 x rank (4 with rslora).")
    lora_path: str | None = option(None, "Folder of an adapter to start from.")
    rslora: bool = option(False, "Scale adapters by alpha / sqrt(rank); for rank 64 and above.")
    lora_target_modules: tuple[str, ...] = option(
        (),
        "What gets an adapter (PEFT's target_modules): all-linear, ends of names like q_proj or "
        "experts, or regular expressions of whole names; none: every projection.",
    )
    use_dora: bool = option(False, "Train the norms of weights' rows too (DoRA).")
    pissa: bool = option(
        False, "Begin with the largest singular values in the adapter, taken out of the base."
    )
    qlora_weight_double_quant: bool = option(
        False, "Keep the scales of nf4 in 8 bits (double quantisation)."
    )
    lora_plus_scale: float = option(1.0, "LoRA+: learning rate of the B matrices over that of A.")
    lora_dropout: float = option(0.0, "Share of what an adapter reads that is dropped.")
    rslora_plus: bool = option(False, "Short for rslora, lora_plus_scale 4 and lora_alpha 4.")
    compute_type: str = option(
        "bf16",
        "Arithmetic of the run. On a CPU products are float32: LoRA keeps the frozen weights in "
        "bfloat16, Full trains float32 weights and saves bfloat16 ones. For LoRA the frozen "
        "weights can be kept in 8 bits (wint8), experts in 4 and the rest in 8 (wint4/8), or in 4 "
        "bits of a normal distribution (nf4); products are those of the values they stand for.",
        choices=("bf16", "wint8", "wint4/8", "nf4"),
    )
    cpu_products: str = option(
        "float32",
        "Products of a CPU run: float32, or bfloat16 with float32 sums, faster on processors with "
        "AVX512-BF16 or AMX and refused on others. Experts multiply in float32.",
        choices=("float32", "bfloat16"),
    )
    continue_training: bool = option(
        True, "Start from the model's weights; false: from random ones (needs only config.json)."
    )
    download_hub: str | None = option(
        None, "Where a hub name is looked up.", choices=(None, "huggingface")
    )
    loss_subbatch_seqlen: int = option(
        -1,
        "Trained tokens that meet the vocabulary at once in the loss; less is less memory. -1: 128 "
        "on a CPU, 4096 on a GPU.",
    )
    recompute: bool = option(
        False, "Forget activations in the forward pass and compute them again in the backward one."
    )
    recompute_granularity: str = option(
        "full",
        "What is computed again: whole blocks (full), the attention layer (full_attn), its "
        "product (core_attn; never stored here, so free), or the feed-forward half (mlp).",
        choices=("full", "full_attn", "core_attn", "mlp"),
    )
    no_recompute_layers: tuple[int, ...] = option((), "Layers that keep their activations.")
    moe_aux_loss_lambda: float = option(
        1e-5, "Weight of the load balance loss (full training; not part of the reported loss)."
    )
    moe_orthogonal_loss_lambda: float = option(
        0.0, "Weight of the router's orthogonality loss (full training; not reported as loss)."
    )
    moe_orthogonal_update: str = option(
        "loss",
        "How moe_orthogonal_loss_lambda acts: in the loss (loss), or after each optimizer step on "
        "the router alone, by lambda times its gradient (decoupled, ERNIE's pre-training) or by "
        "the learning rate times that (decoupled_lr, ERNIEKit's use_ortho_loss_callback).",
        choices=("loss", "decoupled", "decoupled_lr"),
    )
    moe_group_orthogonal_loss: bool = option(
        False, "Compare only experts of the same of moe_k groups of neighbours for orthogonality."
    )
    moe_capacity: float | None = option(
        None,
        "While training an expert takes at most so many times tokens / experts of a batch, first "
        "choices first; what is over is dropped and told as moe_dropped. none: everything.",
    )
    freeze_parameters: tuple[str, ...] = option(
        (),
        "What is not trained (full only): router, experts, shared_experts, embeddings, attention, "
        "or patterns of parameter names like model.layers.0.*; comma list.",
    )
    freeze_config: tuple[str, ...] = option(
        (),
        "Parts of a multimodal model that are not trained (full only): freeze_vision (the tower), "
        "freeze_lm (all but tower, resampler and vision experts); words.",
    )
    token_balance_loss: str = option(
        "none",
        "What the gradient divides a step's loss by: its trained tokens (none; the reported loss "
        "always), all tokens its rows have room for (budget, also true), or for each sample its "
        "own tokens, masked ones too (sample).",
        choices=("none", "budget", "sample"),
    )
    moe_z_loss_lambda: float = option(
        0.0, "Weight of the router's z-loss (full training; not part of the reported loss)."
    )
    moe_use_aux_free_update_coef: float = option(
        0.001, "Step of the routing bias towards even load after each optimizer step (full only)."
    )
    num_nextn_predict_layers: int = option(
        0, "Multi-token-prediction blocks to train along; the model must have them (full only)."
    )
    multi_token_pred_lambda: float = option(0.3, "Weight of the multi-token-prediction loss.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from and how they fill a batch."""

    train_dataset_type: tuple[str, ...] = option(
        ("erniekit",),
        "Format of each training file: erniekit, alpaca, messages, sharegpt or reasoning_gym; "
        "erniekit or pretrain for plain text (stage PT); comma list.",
    )
    train_dataset_path: tuple[str, ...] = option(
        (),
        "Training files (.jsonl, .json, .gz, and .txt for stage PT); comma list. Of reasoning_gym "
        "a task and its settings, as in chain_sum?size=2000&seed=1&max_terms=2.",
    )
    train_dataset_prob: tuple[float, ...] = option(
        (1.0,), "Weight of each training file in mixing: share of the records, for PT of the text."
    )
    eval_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each evaluation file; comma list."
    )
    eval_dataset_path: tuple[str, ...] = option((), "Evaluation files; comma list.")
    eval_dataset_prob: tuple[float, ...] = option(
        (1.0,), "Weight of each evaluation file; 0 leaves it out, others are read whole."
    )
    input_dir: str | None = option(
        None,
        "Documents of token ids for stage PT instead of files: weight prefix weight prefix .., "
        "each prefix of a .bin and an .idx file (Megatron's format).",
    )
    split: tuple[float, ...] = option(
        (950.0, 50.0), "Shares of the documents of input_dir for training, evaluation, neither."
    )
    text_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each file of text alone for stage VL-SFT; comma list."
    )
    text_dataset_path: tuple[str, ...] = option(
        (), "Files of text alone that are mixed in (stage VL-SFT); comma list."
    )
    text_dataset_prob: tuple[float, ...] = option((1.0,), "Weight of each of them in their share.")
    modality_ratio: tuple[float, ...] = option(
        (1.0, 1.0), "Shares of the records that are of text_dataset_path and with pictures."
    )
    chat_template: str | None = option(
        None,
        "Template of a multimodal model whose folder has none or another; none: the folder's.",
        choices=(None, "ernie_vl", "ernie_vl_thinking"),
    )
    max_seq_len: int = option(
        4096, "Tokens of a packed row; a dialogue is cut to fit, a document goes on in the next."
    )
    packing: bool = option(True, "Put several dialogues into one row; they never see each other.")
    greedy_intokens: bool = option(
        True, "Pack a buffer of dialogues by best room (true) or in their order (false)."
    )
    truncate_packing: bool = option(
        True,
        "Stage PT: fill rows to the last place, cutting documents there (true), or cut only those "
        "that are longer than a row.",
    )
    buffer_size: int = option(
        500, "Dialogues held for greedy packing; full rows of documents held to be shuffled."
    )
    padding: bool = option(
        False, "Fill every batch to batch_size x max_seq_len tokens, for steps of a fixed shape."
    )
    mix_strategy: str = option(
        "random",
        "How files are mixed: draws by weight (random), each once (concat), by weight until the "
        "first (interleave_under) or every file (interleave_over) has been used up.",
        choices=("random", "concat", "interleave_under", "interleave_over"),
    )
    random_shuffle: bool = option(True, "Shuffle each file anew in every epoch.")
    num_samples_each_epoch: int = option(
        6_000_000, "Draws in an epoch of random mixing; never more than there are records."
    )
    split_multi_turn: bool = option(
        False, "One sample per trained answer, earlier thoughts dropped by the chat template."
    )
    max_bad_data_share: float = option(
        0.02, "Share of unusable records above which training stops; they are always reported."
    )
    max_estimate_samples: int = option(
        100_000, "Records read to find max_steps, to count faults and to compare with evaluation."
    )
    dataloader_num_workers: int = option(0, "Above 0: batches are prepared by a background thread.")
    prefetch_factor: int = option(2, "Batches prepared ahead by each worker.")

    def _named(self, split: str) -> list[tuple[str, str, float]]:
        names = (getattr(self, f"{split}_dataset_{x}") for x in ("type", "path", "prob"))
        return list(zip(*names))

    def files(self, split: str) -> list[tuple[str, str, float]]:
        """Kind, path and weight of everything a split ("train" or "eval") is read from.

        A prefix of `input_dir` has the kind "indexed". Raises ConfigError for one that is no list
        of weights and prefixes.
        """
        if self.input_dir is None:
            files = self._named(split)
            if split == "train" and self.text_dataset_path:
                return [
                    (kind, path, share * weight / sum(w for *_, w in part))
                    for share, part in zip(self.modality_ratio, (self._named("text"), files))
                    for kind, path, weight in part
                ]
            return files
        if split == "eval" and not sum(self.split[1:2]):
            return []
        words = self.input_dir.split()
        words = ["1", *words] if len(words) == 1 else words
        try:
            pairs = [(float(w), prefix) for w, prefix in zip(words[::2], words[1::2], strict=True)]
        except ValueError:
            raise ConfigError(
                f"input_dir={self.input_dir!r} is no list of weights and prefixes; write it as in "
                "0.4 data/part0 0.6 data/part1"
            ) from None
        return [("indexed", prefix, weight) for weight, prefix in pairs]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures and clips of the records are read (stage: VL-SFT, and DPO, KTO and RM of a VL
    model); limits that are not given are those of the model folder.
    """

    min_pixels: int | None = option(None, "Fewest pixels of an image after resizing.")
    max_pixels: int | None = option(None, "Most pixels of an image after resizing.")
    video_min_pixels: int | None = option(None, "Fewest pixels of a frame after resizing.")
    video_max_pixels: int | None = option(None, "Most pixels of a frame after resizing.")
    video_fps: float = option(2.0, "Frames taken of a second of a clip.")
    video_min_frames: int = option(16, "Fewest frames of a clip, if it has as many.")
    video_max_frames: int = option(480, "Most frames of a clip.")
    video_target_frames: int = option(-1, "Exactly so many frames; -1: by video_fps.")
    video_frames_sample: str = option(
        "middle",
        "Which frame stands for its part of a clip; rand is drawn once for each record.",
        choices=("leading", "middle", "rand"),
    )
    render_timestamp: bool = option(True, "Draw the time on frames.")


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Training on judged answers: pairs (stage: DPO, RM) or single ones (KTO)."""

    loss_type: str = option(
        "sigmoid",
        "Form of the loss on pairs (docs/methods/dpo.md).",
        choices=(
            "sigmoid", "hinge", "ipo", "simpo", "dpop", "sppo_hard", "nca_pair", "or", "orpo",
            "kto_pair", "robust",
        ),
    )  # fmt: skip
    beta: float = option(0.1, "Reward of a nat that the policy gains on the reference.")
    label_smoothing: float = option(
        0.0, "Share of the pairs taken to be labelled the wrong way (sigmoid, simpo and robust)."
    )
    pref_loss_ratio: float = option(1.0, "Weight of the loss on pairs.")
    sft_loss_ratio: float = option(
        0.0, "Weight of the next-token loss on chosen answers that is added (orpo: always 1)."
    )
    simpo_gamma: float = option(0.5, "Margin of rewards that simpo asks for.")
    dpop_lambda: float = option(50.0, "Weight of what a chosen answer has lost, for dpop.")
    normalize_logps: bool = option(
        True, "Scale each answer's log-probability by the mean length of the pair over its own."
    )
    reference_free: bool = option(
        False, "Compare the answers without a reference model (simpo, or and orpo: always)."
    )
    ref_model_update_steps: int = option(
        -1, "Every so many steps the model becomes its own reference; -1: never."
    )
    max_prompt_len: int = option(
        2048, "Tokens of a prompt; a longer one loses its oldest turns. At most max_seq_len - 10."
    )
    mask_out_eos_token: bool = option(True, "The token that ends an answer has no loss.")
    desirable_weight: float = option(1.0, "Weight of the loss of desirable answers (KTO).")
    undesirable_weight: float = option(1.0, "Weight of the loss of undesirable answers (KTO).")


# Keys of `Preferences` that a stage uses; the others are told to be without effect there.
PREFERENCE_KEYS: dict[str, set[str]] = {
    "DPO": {f.name for f in dataclasses.fields(Preferences)}
    - {"desirable_weight", "undesirable_weight"},
    "KTO": {
        "beta", "reference_free", "ref_model_update_steps", "mask_out_eos_token",
        "desirable_weight", "undesirable_weight",
    },
    "RM": {"max_prompt_len"},
    "UPO": {"beta", "max_prompt_len", "mask_out_eos_token"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Reinforcement learning with verifiable rewards, and UPO (stage: UPO)."""

    reward: tuple[str, ...] = option(
        ("record",),
        "What scores an answer: exact, number, regex, format, reasoning_gym, record (the rule that "
        "each record names), model (reward_model), or path/to/file.py:function; comma list.",
    )
    reward_weights: tuple[float, ...] = option((1.0,), "Weight of each reward in the sum.")
    reward_model: str | None = option(
        None, "Folder of a trained reward model, for the reward named model."
    )
    answer_pattern: str | None = option(
        None,
        "Regular expression whose first group is what rules look at; an answer without it is "
        "wrong. none: the whole answer.",
    )
    normalize_rewards: bool = option(
        False, "Scale the rewards of a round to mean 0 and deviation 1 within each training file."
    )
    prompts_per_round: int = option(8, "Prompts that are answered before the policy is updated.")
    num_generations: int = option(8, "Answers to each prompt: its group.")
    max_completion_length: int = option(256, "Most tokens of an answer.")
    rollout_temperature: float = option(1.0, "Randomness of the answers that are learnt from.")
    rollout_top_p: float = option(1.0, "Draw from the likeliest tokens of this probability.")
    rollout_top_k: int = option(0, "Draw from so many of the likeliest tokens; 0: from all.")
    rollout_max_seqs: int = option(64, "Answers under way at once.")
    rollout_server: str | None = option(
        None,
        "Address of a fastdeploy server (--enable-control-api --enable-logprob) that answers, as "
        "http://127.0.0.1:8188; it is given the new weights before each round, in a folder.",
    )
    rollout_correction: str = option(
        "none",
        "Weight of a token by old / rollout, the probabilities by training's arithmetic and the "
        "rollout's: none, truncated (at correction_high) or icepop (0 outside the bounds).",
        choices=("none", "truncated", "icepop"),
    )
    correction_low: float = option(0.5, "Lower bound of icepop.")
    correction_high: float = option(2.0, "Upper bound of truncated and icepop.")
    num_iterations: int = option(1, "Passes over the answers of a round.")
    num_mini_batches: int = option(1, "Optimizer steps of a pass.")
    policy_loss: str = option(
        "ppo",
        "Clipped ratio of tokens (ppo; GRPO's advantages), of whole answers (gspo), or none: only "
        "the loss of pairs.",
        choices=("ppo", "gspo", "none"),
    )
    loss_aggregation: str = option(
        "token",
        "Tokens of a step count alike (token), or answers do (sequence).",
        choices=("token", "sequence"),
    )
    clip_low: float = option(0.2, "The ratio counts down to 1 minus this.")
    clip_high: float = option(0.2, "The ratio counts up to 1 plus this.")
    advantage_std: bool = option(True, "Divide advantages by the deviation of their group.")
    kl_coef: float = option(0.001, "Weight of the divergence from the model before training.")
    upo_mu: float = option(
        0.5, "Weight of the loss of pairs (its beta as for DPO); 0: the policy loss only."
    )
    pair_min_gap: float = option(
        0.0, "A group gives a pair, best against worst, if their rewards differ by more than this."
    )
    pair_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each file of pairs; comma list."
    )
    pair_dataset_path: tuple[str, ...] = option(
        (), "Files of pairs, as for DPO, that take the place of the groups' own (offline UPO)."
    )
    dynamic_sampling: bool = option(
        True, "Leave out prompts whose answers all have the same reward; they are counted."
    )
    min_reward_std: float = option(0.0, "The same if the deviation of a group is not above this.")
    max_refills: int = option(
        0, "Draws of further prompts in place of those left out, in a round, at most."
    )
    curriculum_shares: tuple[float, ...] = option(
        (), "Share of the steps for each training file, one file after another; none: all mixed."
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length of the run, and what happens when."""

    output_dir: str | None = option(
        "./output", "Folder of checkpoints, metrics and the final model; none only to serve."
    )
    overwrite_output_dir: bool = option(
        False, "Start anew and remove earlier checkpoints; otherwise the newest is resumed."
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to resume instead of the newest one of output_dir."
    )
    do_train: bool = option(True, "Train (false: only evaluate).")
    do_eval: bool = option(True, "Evaluate during and after training where there is data for it.")
    seed: int = option(42, "Seed of data order, new weights and rounding.")
    device: str = option("auto", "cpu, gpu (or cuda); auto takes a GPU where there is one.")
    batch_size: int = option(1, "Packed rows in one forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes of one optimizer step.")
    num_train_epochs: float = option(1.0, "Passes over the data, where max_steps is -1.")
    max_steps: int = option(-1, "Optimizer steps; -1: found by packing the data once.")
    logging_steps: int = option(1, "A log line every so many steps; metrics.jsonl has every step.")
    evaluation_strategy: str = option(
        "no", "Evaluate every eval_steps, every epoch or never.", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = option(None, "Steps between evaluations; none: every 500.")
    max_evaluate_steps: int = option(-1, "Batches of an evaluation; -1: all of them.")
    save_strategy: str = option(
        "steps", "Save every save_steps, every epoch or only at the end.",
        choices=("no", "steps", "epoch"),
    )  # fmt: skip
    save_steps: int = option(500, "Steps between checkpoints.")
    save_total_limit: int | None = option(
        None, "Checkpoints kept, the best one among them; none: all."
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
        None, "Whether that number shall be high; none: not of names that end in loss or ppl."
    )
    use_checkpoint: str | None = option(
        None,
        "What eval, export and server take of output_dir: best, newest, ema (averaged weights of "
        "the final model) or a folder; none: the final model, else the newest checkpoint.",
    )
    stop_after_step: int | None = option(
        None, "Save and stop after this step, as SIGTERM does; schedules are those of max_steps."
    )
    max_grad_spike: float = option(
        0.0,
        "A step whose gradient norm is above so many times the median of recent ones is skipped; "
        "0: never.",
    )
    grad_spike_window: int = option(64, "Recent steps of that median, which needs 10 to begin.")
    max_skipped_steps: int = option(
        10, "Steps skipped as not finite or as a spike, before training stops."
    )


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Learning rate, optimizer and the precision of what it remembers."""

    learning_rate: float = option(5e-5, "Peak learning rate.")
    min_lr: float = option(0.0, "Floor of the schedule.")
    lr_scheduler_type: str = option(
        "linear",
        "Shape after warm-up: linear, cosine, constant, constant_with_warmup, polynomial, or "
        "wsd:<steady steps> (wsd alone: steady for 0.9 of the steps).",
    )
    decay_function: str = option(
        "half_life", "Decay of wsd: half_life or 1-sqrt.", choices=("half_life", "1-sqrt")
    )
    warmup_steps: int = option(0, "Linear warm-up, in steps.")
    warmup_ratio: float = option(0.0, "Linear warm-up as a share of max_steps.")
    decay_steps: int | None = option(None, "Steps until min_lr is reached; none: max_steps.")
    num_cycles: float = option(0.5, "Cosine waves of the cosine schedule.")
    lr_end: float = option(1e-7, "Last learning rate of the polynomial schedule.")
    power: float = option(1.0, "Exponent of the polynomial schedule.")
    optim: str = option(
        "adamw",
        "Optimizer: adamw (also adamw_custom), adamw_8bit (moments of one byte), or muon for "
        "matrices with adamw for the rest.",
        choices=("adamw", "adamw_custom", "adamw_8bit", "muon"),
    )
    muon_momentum: float = option(0.95, "Decay of muon's mean of gradients.")
    optimizer_in_backward: bool = option(
        False,
        "Update each weight, and free its gradient, the moment it is known; needs "
        "max_grad_norm: 0 and gradient_accumulation_steps: 1.",
    )
    adam_beta1: float = option(0.9, "Decay of the mean of gradients.")
    adam_beta2: float = option(0.999, "Decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "Added to the root of the squared mean.")
    hidden_dropout_prob: float = option(
        0.0,
        "Share of the outputs of attention and feed-forward that is dropped while training: of the "
        "top layer; less below in proportion, and none at the bottom.",
    )
    attention_probs_dropout_prob: float = option(
        0.0, "The same of attention weights, which then take the slow way through plain torch."
    )
    dropout_warmup_steps: int = option(0, "Steps over which these two rise from 0.")
    weight_decay: float = option(0.0, "Decoupled decay of matrices; never of norms and biases.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never.")
    ema_decay: float = option(
        0.0,
        "Keep a running average of the trained weights, of this decay a step, in float32; 0: none.",
    )
    layerwise_lr_decay_bound: float = option(
        1.0, "Learning rate factor of the lowest layer, rising linearly to 1 at the top."
    )
    moe_gate_lr_ratio: float | None = option(None, "Learning rate factor of the routers.")
    vit_lr_ratio: float | None = option(None, "Learning rate factor of the vision tower.")
    visual_ld: float | None = option(
        None, "The same by depth: this once more for each block of the tower from the top down."
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
class Generation:
    """What `erniekit chat` asks of the server."""

    max_new_tokens: int = option(1024, "Most tokens of an answer.")
    min_tokens: int = option(0, "Fewest tokens of an answer.")
    temperature: float = option(0.95, "Randomness; 0 takes the likeliest token.")
    top_p: float = option(0.7, "Draw from the likeliest tokens that hold this much probability.")
    frequency_penalty: float = option(0.0, "Penalty by count of a token's uses.")
    presence_penalty: float = option(0.0, "Penalty for a token used before.")
    repetition_penalty: float = option(1.0, "Factor against tokens used before.")
    stream: bool = option(True, "Print words as they come.")
    enable_thinking: bool = option(False, "Let a thinking model think first.")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What `erniekit server` starts: a fastdeploy server on this machine."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8188, "Port to listen on.")
    max_model_len: int = option(2048, "Most tokens of prompt and answer together.")
    max_num_seqs: int = option(8, "Requests computed at the same time.")
    gpu_memory_utilization: float = option(0.9, "Share of the memory the server may take.")
    block_size: int = option(64, "Tokens of a block of the key/value cache.")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `erniekit export` and `erniekit split` write."""

    export_format: str | None = option(
        None,
        "A model folder in one of the layouts, a GGUF file for llama.cpp, or the adapter alone for "
        "PEFT; none: the base with the adapter merged into it, in the layout of the base.",
        choices=(None, "pt", "paddle", "transformers", "gguf", "peft"),
    )
    gguf_dtype: str = option(
        "f16", "Type of the weights in a GGUF file.", choices=("f32", "f16", "bf16", "q8_0", "q4_0")
    )
    copy_tokenizer: bool = option(True, "Put the tokenizer beside the weights.")
    max_shard_size: float = option(5.0, "Largest weight file, in GB.")


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """What a run tells: where its numbers go, answers to evaluation prompts, public benchmarks."""

    report_to: tuple[str, ...] = option(
        (),
        "Where numbers go besides metrics.jsonl and report.html: tensorboard, visualdl, wandb, "
        "swanlab (the last two write to disk unless WANDB_MODE or SWANLAB_MODE says otherwise); "
        "all: those that are installed; comma list.",
    )
    logging_dir: str | None = option(
        None, "Folder of what report_to writes; none: output_dir/logs."
    )
    disable_tqdm: bool = option(
        False, "Print a line a step on a terminal too, where there is a progress bar otherwise."
    )
    num_answers: int = option(
        3, "Evaluation prompts, spread over the data, that the model answers; -1: all, 0: none."
    )
    max_answer_tokens: int = option(64, "Most tokens of such an answer.")
    answer_steps: int | None = option(
        None,
        "Steps between answers while training; none: where the run evaluates, before the first "
        "and after the last step.",
    )
    lm_eval_tasks: tuple[str, ...] = option(
        (), "Tasks of lm-eval that `erniekit eval` runs; comma list."
    )
    lm_eval_task_path: str | None = option(
        None,
        "Folder of task files, which takes the place of lm-eval's own tasks; what the files name "
        "(data, Python functions) is used.",
    )
    lm_eval_num_fewshot: int | None = option(None, "Examples before a question; none: the task's.")
    lm_eval_limit: int | None = option(None, "Questions of each task; none: all.")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Several processes: how many, and what is divided among them (docs/parallelism.md)."""

    nproc_per_node: int | None = option(
        None, "Processes to start on this machine; none: one for each visible GPU, one on a CPU."
    )
    sharding: str | None = option(
        None,
        "What each rank holds a part of: nothing (none), the optimizer's state (stage1), gradients "
        "too (stage2), weights too (stage3).",
        choices=(None, "stage1", "stage2", "stage3"),
    )
    sharding_parallel_degree: int = option(
        -1, "Ranks over which one copy is divided; -1: all that data_parallel_degree leaves."
    )
    data_parallel_degree: int = option(
        -1, "Copies; -1: what sharding leaves. Every rank of every copy has its own batches."
    )
    ddp_timeout: int = option(
        1800, "Seconds that a rank waits for another before all stop, naming it."
    )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `erniekit data` does: show samples token by token, write token ids, or else go through
    the files.
    """

    show: int = option(0, "Samples to show, in the order of training, packed into rows; 0: none.")
    sample: str | None = option(
        None, "File and line of a record to show, as in data/train.jsonl:17; with what is cut off."
    )
    dataset_output_dir: str | None = option(
        None,
        "Folder for the documents of the files (stage PT) as token ids, each file a prefix for "
        "input_dir.",
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that go through the files; none: one for each processor."
    )


SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "wsd")
SINKS = ("tensorboard", "visualdl", "wandb", "swanlab", "all", "none")
GROUPS = (
    Model, Data, Pictures, Preferences, Policy, Training, Optimisation, Generation, Server, Export,
    Reporting, Parallel, Audit,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every setting of a run, as in `run.data.max_seq_len`; see each group's fields."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    pictures: Pictures = field(default_factory=Pictures)
    preferences: Preferences = field(default_factory=Preferences)
    policy: Policy = field(default_factory=Policy)
    training: Training = field(default_factory=Training)
    optimisation: Optimisation = field(default_factory=Optimisation)
    generation: Generation = field(default_factory=Generation)
    server: Server = field(default_factory=Server)
    export: Export = field(default_factory=Export)
    reporting: Reporting = field(default_factory=Reporting)
    parallel: Parallel = field(default_factory=Parallel)
    audit: Audit = field(default_factory=Audit)
    words: tuple[str, ...] = field(default=(), compare=False)  # of the command line
    without_effect: tuple[str, ...] = ()

    def flat(self) -> dict[str, Any]:
        """All keys and values, in the order of the groups: the content of `run.yaml`."""
        groups = [getattr(self, f.name) for f in dataclasses.fields(self)][: len(GROUPS)]
        return {
            key: list(value) if isinstance(value, tuple) else value
            for group in groups
            for key, value in dataclasses.asdict(group).items()
        }

    @property
    def is_lora(self) -> bool:
        return self.model.fine_tuning == "LoRA"

    @property
    def has_answers(self) -> bool:
        """Whether its records are questions that the model is asked while it trains: not so of
        plain text and of pictures, and a reward model does not answer.
        """
        return self.model.stage not in ("PT", "RM", "VL-SFT")

    @property
    def output(self) -> Path:
        if self.training.output_dir is None:
            raise ConfigError("output_dir is none; give a folder")
        return Path(self.training.output_dir)


def read_run(words: Sequence[str]) -> Run:
    """The run described by `[file.yaml] key=value ...`; `--key value` is understood too.

    Raises ConfigError in one sentence for anything that does not fit.
    """
    return dataclasses.replace(run_from(*read_values(words)), words=tuple(words))


def read_values(words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The flat, unchecked values of such words, and where they come from."""
    words = list(words)
    values: dict[str, Any] = {}
    origin = "the command line"
    if words and "=" not in words[0] and not words[0].startswith("-"):
        origin = words.pop(0)
        if Path(origin).suffix not in (".yaml", ".yml", ".json"):
            raise ConfigError(f"{origin!r} is not a .yaml, .yml or .json file of settings")
        values = read_yaml(origin)
    return values | read_overrides(_undashed(words)), origin


def run_from(values: Mapping[str, Any], origin: str = "the settings") -> Run:
    """A checked `Run` from a flat mapping of ERNIEKit's keys."""
    own = {f.name for kind in GROUPS for f in dataclasses.fields(kind)}
    values = {key: _respelt(key, value) for key, value in values.items()}
    values = foreign.renamed(values, origin)
    kept, without_effect = foreign.separate(values, own, origin)
    lora = kept.get("lora")
    groups = fill(GROUPS, kept, origin)
    if groups[0].lora is not None:
        groups[0] = _from_lora_key(groups[0], given="fine_tuning" in kept, lora=lora)
    names = [f.name for f in dataclasses.fields(Run)][: len(GROUPS)]
    run = Run(**dict(zip(names, groups)))
    given, defaults = dataclasses.asdict(run.preferences), dataclasses.asdict(Preferences())
    unused = given.keys() - PREFERENCE_KEYS.get(run.model.stage, set())
    only = {"simpo_gamma": "simpo", "dpop_lambda": "dpop"}
    unused |= {key for key, name in only.items() if run.preferences.loss_type != name}
    without_effect += [key for key in given if key in unused and given[key] != defaults[key]]
    if run.model.stage not in PICTURED:
        without_effect += given_of(run.pictures)
    o = run.optimisation
    if o.dropout_warmup_steps and not (o.hidden_dropout_prob or o.attention_probs_dropout_prob):
        without_effect.append("dropout_warmup_steps")
    if run.model.stage not in _ONE_LOSS_A_TOKEN and run.model.token_balance_loss != "none":
        without_effect.append("token_balance_loss")
    if run.model.stage != "UPO":
        without_effect += given_of(run.policy)
    run = dataclasses.replace(run, without_effect=tuple(without_effect))
    validate(run)
    return run


def given_of(group: Pictures | Policy) -> list[str]:
    """The keys of a group whose values are not the defaults."""
    values, defaults = dataclasses.asdict(group), dataclasses.asdict(type(group)())
    return [key for key in values if values[key] != defaults[key]]


def _respelt(key: str, value: Any) -> Any:
    """ERNIEKit's empty strings mean "not given"; YAML reads the strategy `no` as false."""
    if key.endswith("_strategy") and value is False:
        return "no"
    if key == "token_balance_loss" and str(value).lower() in ("true", "false"):
        return "budget" if str(value).lower() == "true" else "none"
    if key == "modality_ratio" and isinstance(value, str):
        return value.strip().strip("[]")
    if key == "freeze_config" and isinstance(value, str):
        return value.replace(",", " ").split()
    return None if isinstance(value, str) and not value.strip() else value


def _from_lora_key(model: Model, *, given: bool, lora: Any) -> Model:
    wanted = "LoRA" if model.lora else "Full"
    if given and model.fine_tuning != wanted:
        raise ConfigError(
            f"lora={lora} contradicts fine_tuning={model.fine_tuning}; give only fine_tuning"
        )
    return dataclasses.replace(model, fine_tuning=wanted, lora=None)


def _undashed(words: list[str]) -> list[str]:
    """`--key value` and `--key=value` as `key=value`."""
    result, rest = [], iter(words)
    for word in rest:
        if not word.startswith("--") or "=" in word:
            result.append(word.removeprefix("--"))
            continue
        value = next(rest, None)
        if value is None:
            raise ConfigError(f"{word} has no value; write {word.removeprefix('--')}=value")
        result.append(f"{word.removeprefix('--')}={value}")
    return result


def validate(run: Run) -> None:
    """Checks that concern more than one key, and ranges; raises ConfigError."""
    model, data, training, optimisation = run.model, run.data, run.training, run.optimisation
    for group, key, low in (
        (model, "lora_rank", 1),
        (data, "max_seq_len", 8),
        (data, "buffer_size", 1),
        (data, "num_samples_each_epoch", 1),
        (data, "max_estimate_samples", 1),
        (training, "batch_size", 1),
        (training, "gradient_accumulation_steps", 1),
        (training, "logging_steps", 1),
        (training, "save_steps", 1),
        (training, "max_grad_spike", 0),
        (training, "grad_spike_window", 1),
        (training, "seed", 0),
        (run.reporting, "num_answers", -1),
        (run.audit, "show", 0),
        (run.reporting, "max_answer_tokens", 1),
        (optimisation, "learning_rate", 0),
        (optimisation, "warmup_steps", 0),
        (run.parallel, "ddp_timeout", 1),
    ):
        if getattr(group, key) < low:
            raise ConfigError(f"{key}={getattr(group, key)} is too small; give {low} or more")
    if model.loss_subbatch_seqlen < 1 and model.loss_subbatch_seqlen != -1:
        raise ConfigError(
            f"loss_subbatch_seqlen={model.loss_subbatch_seqlen} is no number of tokens; give 1 or "
            "more, or -1"
        )
    for name in run.reporting.report_to:
        if name not in SINKS:
            raise ConfigError(f"report_to={name!r} is not known; use {', '.join(SINKS)}")
    for split in ("train", "eval", "text"):
        _check_sources(data, split, model.stage)
    _check_multimodal(run)
    schedule, _, steady = optimisation.lr_scheduler_type.partition(":")
    if schedule not in SCHEDULES or (steady and not (schedule == "wsd" and steady.isdigit())):
        raise ConfigError(
            f"lr_scheduler_type={optimisation.lr_scheduler_type!r} is not known; use one of "
            f"{', '.join(SCHEDULES)}, or wsd:<steady steps>"
        )
    if optimisation.min_lr > optimisation.learning_rate:
        raise ConfigError(
            f"min_lr={optimisation.min_lr} is above learning_rate={optimisation.learning_rate}; "
            "it is the floor of the schedule"
        )
    if training.max_steps == 0 or training.max_steps < -1:
        raise ConfigError(
            f"max_steps={training.max_steps} is no number of steps; give -1 or 1, 2.."
        )
    if optimisation.optimizer_in_backward and (
        optimisation.max_grad_norm or training.gradient_accumulation_steps > 1
    ):
        raise ConfigError(
            "optimizer_in_backward cannot go with "
            f"max_grad_norm={optimisation.max_grad_norm:g} and "
            f"gradient_accumulation_steps={training.gradient_accumulation_steps}, which need all "
            "gradients first; give max_grad_norm: 0 and gradient_accumulation_steps: 1"
        )
    _check_safety(run)
    if run.is_lora and model.num_nextn_predict_layers:
        raise ConfigError(
            "num_nextn_predict_layers trains a block of the model itself; use fine_tuning: Full"
        )
    if run.export.max_shard_size <= 0:
        raise ConfigError(
            f"max_shard_size={run.export.max_shard_size:g} GB is no size; give a number above 0"
        )
    for key in ("nproc_per_node", "sharding_parallel_degree", "data_parallel_degree"):
        value = getattr(run.parallel, key)
        if value is not None and (value < -1 or value == 0 or (value < 0 and key[0] == "n")):
            raise ConfigError(f"{key}={value} is no number of processes; give 1 or more")
    if model.lora_path and not run.is_lora:
        raise ConfigError("lora_path is an adapter to start from; it needs fine_tuning: LoRA")
    _check_adapters(run)
    _check_dropout(run)
    if model.stage in PREFERENCE_KEYS:
        _check_preferences(run)
    if model.stage == "DPO":
        _check_loss_type(run.preferences)
    if model.stage == "UPO":
        _check_policy(run)
    if model.moe_capacity is not None and model.moe_capacity <= 0:
        raise ConfigError(
            f"moe_capacity={model.moe_capacity:g} would drop every token; give a number above 0, "
            "or leave it out"
        )
    if model.moe_capacity is not None and model.stage not in _ONE_LOSS_A_TOKEN:
        raise ConfigError(
            f"moe_capacity={model.moe_capacity:g} drops tokens of the answers that stage="
            f"{model.stage} compares; leave it out"
        )
    if run.is_lora and model.freeze_parameters:
        raise ConfigError(
            "freeze_parameters chooses what full training leaves out; LoRA trains its adapters "
            "alone: use fine_tuning: Full"
        )
    if data.input_dir is not None:
        _check_indexed(run)
    if run.is_lora and not model.continue_training:
        raise ConfigError(
            "continue_training=false starts from random weights, which adapters would leave as "
            "they are; use fine_tuning: Full"
        )


def _check_multimodal(run: Run) -> None:
    model, data, o = run.model, run.data, run.optimisation
    for word in model.freeze_config:
        if word not in FREEZE_WORDS:
            raise ConfigError(
                f"freeze_config={word!r} is not known; use {' or '.join(FREEZE_WORDS)}"
            )
    if len(data.modality_ratio) != 2 or min(data.modality_ratio) < 0 or not data.modality_ratio[1]:
        raise ConfigError(
            f"modality_ratio={list(data.modality_ratio)} must be two shares, of text and of "
            "pictures, the second above 0, as in 1,1"
        )
    for key, value in (("vit_lr_ratio", o.vit_lr_ratio), ("visual_ld", o.visual_ld)):
        if value is not None and value < 0:
            raise ConfigError(f"{key}={value:g} is below 0; give a factor such as 0.9")
    if model.stage != "VL-SFT":
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
    o, model = run.optimisation, run.model
    for key, rate in (
        ("hidden_dropout_prob", o.hidden_dropout_prob),
        ("attention_probs_dropout_prob", o.attention_probs_dropout_prob),
        ("lora_dropout", model.lora_dropout),
    ):
        if not 0 <= rate < 1:
            raise ConfigError(f"{key}={rate:g} is no share of what is kept; give 0 to below 1")
    if o.dropout_warmup_steps < 0:
        raise ConfigError(
            f"dropout_warmup_steps={o.dropout_warmup_steps} is below 0; give 0 or more"
        )
    if model.lora_dropout and model.use_dora:
        raise ConfigError(
            f"lora_dropout={model.lora_dropout:g} cannot go with use_dora, which scales base and "
            "adapter together; give one of them"
        )


def _check_adapters(run: Run) -> None:
    model = run.model
    is_small = model.compute_type != "bf16"
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
    if p.beta <= 0:
        raise ConfigError(f"beta={p.beta:g} rewards nothing; give a number above 0, such as 0.1")
    for key in (
        "pref_loss_ratio", "sft_loss_ratio", "dpop_lambda", "desirable_weight",
        "undesirable_weight",
    ):  # fmt: skip
        if getattr(p, key) < 0:
            raise ConfigError(f"{key}={getattr(p, key):g} is below 0; give 0 or more")
    if p.ref_model_update_steps == 0 or p.ref_model_update_steps < -1:
        raise ConfigError(
            f"ref_model_update_steps={p.ref_model_update_steps} is no number of steps; give -1 or "
            "1, 2.."
        )
    if p.reference_free and p.ref_model_update_steps > 0:
        raise ConfigError(
            f"ref_model_update_steps={p.ref_model_update_steps} updates a reference that "
            "reference_free=True does without; leave one of them out"
        )
    if p.max_prompt_len < 1:
        raise ConfigError(f"max_prompt_len={p.max_prompt_len} is too small; give 1 or more")
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
    for key, low in (
        ("prompts_per_round", 1),
        ("num_generations", 2),
        ("max_completion_length", 1),
        ("rollout_temperature", 0.01),
        ("rollout_top_k", 0),
        ("rollout_max_seqs", 1),
        ("num_iterations", 1),
        ("num_mini_batches", 1),
        ("clip_low", 0),
        ("clip_high", 0),
        ("kl_coef", 0),
        ("upo_mu", 0),
        ("pair_min_gap", 0),
        ("min_reward_std", 0),
        ("max_refills", 0),
    ):
        if getattr(p, key) < low:
            raise ConfigError(f"{key}={getattr(p, key)} is too small; give {low} or more")
    if not 0 < p.rollout_top_p <= 1:
        raise ConfigError(f"rollout_top_p={p.rollout_top_p:g} is no share; give 0 to 1, not 0")
    if not 0 < p.correction_low <= 1 <= p.correction_high:
        raise ConfigError(
            f"correction_low={p.correction_low:g} and correction_high={p.correction_high:g} are no "
            "bounds around 1; give some such as 0.5 and 2"
        )
    if len(p.reward) != len(p.reward_weights):
        raise ConfigError(
            f"reward and reward_weights have {len(p.reward)} and {len(p.reward_weights)} entries; "
            "give one weight for each reward"
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
    shares, files = p.curriculum_shares, len(data.train_dataset_path)
    if shares and (len(shares) != files or min(shares) <= 0):
        raise ConfigError(
            f"curriculum_shares={list(shares)} must be a share above 0 for each of the {files} "
            "training files"
        )
    if data.max_seq_len <= p.max_completion_length:
        raise ConfigError(
            f"max_completion_length={p.max_completion_length} leaves no room for a prompt in "
            f"max_seq_len={data.max_seq_len}; give a larger max_seq_len"
        )


def _check_loss_type(p: Preferences) -> None:
    """What a form of the loss on pairs cannot go with."""
    if not 0 <= p.label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing={p.label_smoothing:g} is no share of wrong labels; give 0, or less "
            "than 0.5"
        )
    if p.label_smoothing and p.loss_type not in ("sigmoid", "simpo", "robust"):
        raise ConfigError(
            f"label_smoothing={p.label_smoothing:g} is not part of loss_type={p.loss_type}; leave "
            "it out, or use sigmoid, simpo or robust"
        )
    if p.loss_type == "orpo" and p.sft_loss_ratio not in (0, 1):
        raise ConfigError(
            f"sft_loss_ratio={p.sft_loss_ratio:g} contradicts loss_type=orpo, where it is 1; use "
            "loss_type: or"
        )
    if p.loss_type in ("simpo", "or", "orpo") and p.ref_model_update_steps > 0:
        raise ConfigError(
            f"ref_model_update_steps={p.ref_model_update_steps} updates a reference that "
            f"loss_type={p.loss_type} does without; leave it out"
        )


def _check_safety(run: Run) -> None:
    """What keeps a run safe: the best checkpoint, the average, spikes, the last step."""
    training, decay = run.training, run.optimisation.ema_decay
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
    if not 0 <= decay < 1:
        raise ConfigError(
            f"ema_decay={decay:g} is no decay; give 0 for none, or a number like 0.999 below 1"
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
    if training.stop_after_step is not None and training.stop_after_step < 1:
        raise ConfigError(f"stop_after_step={training.stop_after_step} is no step; give 1, 2..")


def _check_indexed(run: Run) -> None:
    data = run.data
    if run.model.stage != "PT":
        raise ConfigError(
            f"input_dir holds documents, which stage={run.model.stage} cannot read; use stage: PT"
        )
    if data.train_dataset_path or data.eval_dataset_path:
        raise ConfigError(
            "input_dir has its own documents for training and evaluation (split); leave "
            "train_dataset_path and eval_dataset_path out"
        )
    if not 1 <= len(data.split) <= 3 or min(data.split) < 0 or not data.split[0]:
        raise ConfigError(
            f"split={list(data.split)} must be one to three shares, the first above 0, as in 950,50"
        )
    weights = [weight for _, _, weight in data.files("train")]
    if min(weights, default=0) < 0 or sum(weights) <= 0:
        raise ConfigError(f"input_dir={data.input_dir!r} must have weights of 0 or more")


FREEZE_WORDS = ("freeze_vision", "freeze_lm")
_JUDGED = ("erniekit", "alpaca", "messages", "chatml")
_DIALOGUES = ("erniekit", "alpaca", "messages", "sharegpt", "reasoning_gym", "chatml")
_KINDS = {"PT": ("erniekit", "pretrain"), **dict.fromkeys(("DPO", "KTO", "RM"), _JUDGED)}
_ONE_LOSS_A_TOKEN = ("SFT", "PT", "VL-SFT", "OCR-VL-SFT")


def _check_sources(data: Data, split: str, stage: str) -> None:
    kinds, paths, probs = (getattr(data, f"{split}_dataset_{x}") for x in ("type", "path", "prob"))
    if paths and not len(kinds) == len(paths) == len(probs):
        raise ConfigError(
            f"{split}_dataset_type, _path and _prob have {len(kinds)}, {len(paths)} and "
            f"{len(probs)} entries; give one of each per file"
        )
    known = _KINDS.get(stage, _DIALOGUES)
    for kind in kinds:
        if kind not in known and (paths or kind != "pretrain"):
            *first, last = (kind for kind in known if kind != "chatml")
            raise ConfigError(
                f"{split}_dataset_type={kind!r} is not known for stage {stage}; use "
                f"{', '.join(first)} or {last}"
            )
    if stage != "PT" and (texts := [p for p in paths if p.removesuffix(".gz").endswith(".txt")]):
        raise ConfigError(f"{texts[0]} is plain text, which only stage PT reads; give .jsonl files")
    if paths and (min(probs) < 0 or sum(probs) <= 0):
        raise ConfigError(f"{split}_dataset_prob={list(probs)} must be weights of 0 or more")


def resolved(run: Run, device: str) -> Run:
    """A new `Run` in which nothing is left to be decided, for a run on `device` (cpu or cuda)."""
    model, training, optimisation = run.model, run.training, run.optimisation
    if model.rslora_plus:
        model = dataclasses.replace(
            model, rslora_plus=False, rslora=True, lora_plus_scale=4.0, lora_alpha=4.0
        )
    if model.lora_alpha == -1:
        alpha = 4.0 if model.rslora else 2.0 * model.lora_rank
        model = dataclasses.replace(model, lora_alpha=alpha)
    if model.loss_subbatch_seqlen == -1:
        # A GPU wants products as large as it can get; a CPU keeps the logits in its cache.
        chunk = 4096 if device == "cuda" else 128
        model = dataclasses.replace(model, loss_subbatch_seqlen=chunk)
    lean = not run.is_lora and device == "cpu"
    if optimisation.amp_master_grad is None:
        optimisation = dataclasses.replace(optimisation, amp_master_grad=not lean)
    if optimisation.use_lowprecision_moment is None:
        optimisation = dataclasses.replace(optimisation, use_lowprecision_moment=lean)
    training = dataclasses.replace(
        training,
        device="gpu" if device == "cuda" else "cpu",
        eval_steps=training.eval_steps or 500,
    )
    return dataclasses.replace(run, model=model, training=training, optimisation=optimisation)


def changed(run: Run) -> dict[str, Any]:
    """The keys whose value is not the default."""
    defaults = Run().flat()
    return {key: value for key, value in run.flat().items() if value != defaults[key]}


def to_yaml(run: Run) -> str:
    import yaml

    return yaml.safe_dump(run.flat(), sort_keys=False, allow_unicode=True)
