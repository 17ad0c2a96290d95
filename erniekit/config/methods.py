"""Settings of methods that judge answers: preferences, and reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from ernie.settings import listed, option


@dataclass(frozen=True, kw_only=True)
class LossType:
    """What is true of a loss on pairs; its formula is in `erniekit.preference_losses`."""

    uses_reference: bool = True
    uses_beta: bool = True
    uses_means: bool = False  # of tokens; sums otherwise
    uses_baselines: bool = False  # of the whole step, a forward pass more
    smooths_labels: bool = False
    has_sft: bool = False  # with weight 1, whatever sft_loss_ratio says
    settings: tuple[str, ...] = ()  # keys that only it reads


LOSS_TYPES = {
    "sigmoid": LossType(smooths_labels=True),
    "hinge": LossType(),
    "ipo": LossType(uses_means=True),
    "simpo": LossType(
        uses_reference=False, uses_means=True, smooths_labels=True, settings=("simpo_gamma",)
    ),
    "dpop": LossType(settings=("dpop_lambda",)),
    "sppo_hard": LossType(),
    "nca_pair": LossType(),
    "or": LossType(uses_reference=False, uses_beta=False, uses_means=True),
    "orpo": LossType(uses_reference=False, uses_beta=False, uses_means=True, has_sft=True),
    "kto_pair": LossType(uses_baselines=True),
    "robust": LossType(smooths_labels=True),
}
SMOOTHING = [name for name, row in LOSS_TYPES.items() if row.smooths_labels]
_FREE = [name for name, row in LOSS_TYPES.items() if not row.uses_reference]
_WITH_SFT = [name for name, row in LOSS_TYPES.items() if row.has_sft]


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Training on judged answers: pairs (stage: DPO, RM) or single ones (KTO)."""

    loss_type: str = option(
        "sigmoid",
        "Form of the loss on pairs (docs/methods/dpo.md).",
        choices=tuple(LOSS_TYPES),
    )
    beta: float = option(
        0.1, "Scale of the implicit reward beta * log(policy / reference).", above=0
    )
    label_smoothing: float = option(
        0.0,
        f"Share of the pairs taken to be labelled the wrong way ({listed(SMOOTHING, 'and')}).",
        least=0,
        below=0.5,
    )
    pref_loss_ratio: float = option(1.0, "Weight of the loss on pairs.", least=0)
    sft_loss_ratio: float = option(
        0.0,
        "Weight of the next-token loss on chosen answers that is added "
        f"({listed(_WITH_SFT, 'and')}: always 1).",
        least=0,
    )
    simpo_gamma: float = option(0.5, "Margin of rewards that simpo asks for.")
    dpop_lambda: float = option(50.0, "Weight of what a chosen answer has lost, for dpop.", least=0)
    normalize_logps: bool = option(
        True, "Scale each answer's log-probability by the mean length of the pair over its own."
    )
    reference_free: bool = option(
        False,
        f"Compare the answers without a reference model ({listed(_FREE, 'and')}: always).",
    )
    ref_model_update_steps: int = option(
        -1, "Every so many steps the model becomes its own reference; -1: never.", least=1, also=-1
    )
    max_prompt_len: int | None = option(
        None,
        "Tokens of a prompt; a longer one loses its oldest turns. At most, and none: "
        "max_seq_len - 10.",
        least=1,
    )
    mask_out_eos_token: bool = option(True, "The token that ends an answer has no loss.")
    desirable_weight: float = option(1.0, "Weight of the loss of desirable answers (KTO).", least=0)
    undesirable_weight: float = option(
        1.0, "Weight of the loss of undesirable answers (KTO).", least=0
    )

    @property
    def loss(self) -> LossType:
        return LOSS_TYPES[self.loss_type]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Reinforcement learning with verifiable rewards, and UPO (stage: UPO)."""

    reward: tuple[str, ...] = option(
        ("record",),
        "What scores an answer: exact, number, regex, format, reasoning_gym, record (the rule that "
        "each record names), model (reward_model), or path/to/file.py:function; comma list.",
        path=True,
    )
    reward_weights: tuple[float, ...] = option((1.0,), "Weight of each reward in the sum.")
    reward_model: str | None = option(
        None, "Folder of a trained reward model, for the reward named model.", path=True
    )
    answer_pattern: str | None = option(
        None,
        "Regular expression whose first group is what rules look at; an answer without it is "
        "wrong. none: the whole answer.",
    )
    normalize_rewards: bool = option(
        False,
        "Scale the rewards of a round to mean 0 and deviation 1 within each training file; only "
        "with advantage_std: false.",
    )
    prompts_per_round: int = option(
        8, "Prompts that are answered before the policy is updated.", least=1
    )
    num_generations: int = option(8, "Answers to each prompt: its group.", least=2)
    max_completion_length: int = option(256, "Most tokens of an answer.", least=1)
    rollout_temperature: float = option(
        1.0, "Randomness of the answers that are learnt from.", least=0.01
    )
    rollout_top_p: float = option(
        1.0, "Draw from the likeliest tokens of this probability.", above=0, most=1
    )
    rollout_top_k: int = option(
        0, "Draw from so many of the likeliest tokens; 0: from all.", least=0
    )
    rollout_max_seqs: int = option(64, "Answers under way at once.", least=1)
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
    correction_low: float = option(0.5, "Lower bound of icepop.", above=0, most=1)
    correction_high: float = option(2.0, "Upper bound of truncated and icepop.", least=1)
    num_iterations: int = option(1, "Passes over the answers of a round.", least=1)
    num_mini_batches: int = option(1, "Optimizer steps of a pass.", least=1)
    policy_loss: str = option(
        "ppo",
        "Clipped ratio of tokens (ppo; GRPO's advantages), of whole answers (gspo), or none: only "
        "the loss of pairs.",
        choices=("ppo", "gspo", "none"),
    )
    loss_aggregation: str | None = option(
        None,
        "Tokens of a step count alike (token), or answers do (sequence); none: answers for gspo, "
        "else tokens.",
        choices=("token", "sequence"),
    )
    clip_low: float = option(0.2, "The ratio counts down to 1 minus this.", least=0)
    clip_high: float = option(0.2, "The ratio counts up to 1 plus this.", least=0)
    advantage_std: bool = option(True, "Divide advantages by the deviation of their group.")
    kl_coef: float = option(
        0.001, "Weight of the divergence from the model before training.", least=0
    )
    upo_mu: float = option(
        0.5, "Weight of the loss of pairs (its beta as for DPO); 0: the policy loss only.", least=0
    )
    pair_min_gap: float = option(
        0.0,
        "A group gives a pair, best against worst, if their rewards differ by more than this.",
        least=0,
    )
    pair_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each file of pairs; comma list."
    )
    pair_dataset_path: tuple[str, ...] = option(
        (),
        "Files of pairs, as for DPO, that take the place of the groups' own (offline UPO).",
        path=True,
    )
    dynamic_sampling: bool = option(
        True, "Leave out prompts whose answers all have the same reward; they are counted."
    )
    min_reward_std: float = option(
        0.0, "The same if the deviation of a group is not above this.", least=0
    )
    max_refills: int = option(
        0, "Draws of further prompts in place of those left out, in a round, at most.", least=0
    )
    curriculum_shares: tuple[float, ...] = option(
        (), "Share of the steps for each phase, one after another; none: all files mixed."
    )
    curriculum_files: tuple[int, ...] = option(
        (),
        "Training files of each phase, in their order, which are mixed; none: one each.",
        least=1,
    )

    @property
    def phase_sizes(self) -> tuple[int, ...]:
        """Training files of each phase of a curriculum; nothing where there is none."""
        shares = self.curriculum_shares
        return (self.curriculum_files or (1,) * len(shares)) if shares else ()

    @property
    def has_reference(self) -> bool:
        return self.kl_coef > 0 or self.upo_mu > 0

    @property
    def correction(self) -> tuple[str, float, float]:
        """`rollout_correction` with its bounds, 0 for those that it does not have."""
        kind = self.rollout_correction
        low = self.correction_low * (kind == "icepop")
        return kind, low, self.correction_high * (kind != "none")

    @property
    def aggregation(self) -> str:
        """`loss_aggregation`, or what belongs to the loss: GSPO is published as a mean over answers
        (arXiv 2507.18071, eq. 5).
        """
        return self.loss_aggregation or ("sequence" if self.policy_loss == "gspo" else "token")
