"""The stages: what differs between them, one row each, keyed by the published name.

A stage is added by a row here and its recipe. What a run does because of its stage, it reads from
the row (`Run.stage`); names of stages stand in advice to the user, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie.settings import field_types
from erniekit.config.methods import Policy, Preferences

SampleKind = Literal["dialogue", "document", "pair", "answer"]
_JUDGED = ("erniekit", "alpaca", "messages", "chatml")
# Formats of the files that hold such samples.
FORMATS: dict[SampleKind, tuple[str, ...]] = {
    "dialogue": ("erniekit", "alpaca", "messages", "sharegpt", "reasoning_gym", "chatml"),
    "document": ("erniekit", "pretrain"),  # plain text
    "pair": _JUDGED,
    "answer": _JUDGED,  # a single one
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What differs between stages. `recipe` is a module with `run` and `method`."""

    recipe: str | None  # none: a published stage that cannot be trained here
    sample: SampleKind = "dialogue"
    settings: frozenset[str] = frozenset()  # keys of Preferences and Policy that it reads
    judges_answers: bool = False  # else each token has a loss of its own
    sums_log_probs: bool = False  # of whole answers, to compare them with those of a reference
    measures_step: bool = False  # by a forward pass more, whatever the settings are
    reads_pictures: bool = False  # where the model does
    needs_pictures: bool = False  # only models that read pictures
    has_reward_head: bool = False
    balances_load: bool = False  # of experts, by the routing bias, unless the settings say more
    has_rollouts: bool = False  # learns from rounds of the model's own answers

    @property
    def has_answers(self) -> bool:
        """Whether its records are questions that the model is asked while it trains: not so of
        plain text, and a reward model does not answer.
        """
        return self.sample != "document" and not self.has_reward_head

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Numbers of an evaluation, without eval_; some only where the loss has that part."""
        if self.has_rollouts:
            return ("reward", "right", "length", "prompts", "seconds")
        if not self.judges_answers:
            per_byte = ("bits_per_byte",) * (self.sample == "document")
            return ("loss", "ppl", *per_byte, "accuracy", "tokens", "seconds")
        units = ("kl", "answers") if self.sample == "answer" else ("pairs",)
        return (
            "loss", "rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected",
            "preference_loss", "sft_loss", *units, "tokens", "seconds",
        )  # fmt: skip


STAGES: dict[str, Stage] = {
    "SFT": Stage(recipe="erniekit.recipes.sft"),
    "DPO": Stage(
        recipe="erniekit.recipes.preference",
        sample="pair",
        settings=frozenset(field_types(Preferences))
        - {"desirable_weight", "undesirable_weight"},
        judges_answers=True,
        sums_log_probs=True,
        reads_pictures=True,
    ),
    "UPO": Stage(
        recipe="erniekit.recipes.upo",
        settings=frozenset({"beta", "max_prompt_len", "mask_out_eos_token", *field_types(Policy)}),
        judges_answers=True,
        has_rollouts=True,
    ),
    "KTO": Stage(
        recipe="erniekit.recipes.kto",
        sample="answer",
        settings=frozenset({
            "beta", "reference_free", "ref_model_update_steps", "mask_out_eos_token",
            "desirable_weight", "undesirable_weight",
        }),
        judges_answers=True,
        sums_log_probs=True,
        measures_step=True,
        reads_pictures=True,
    ),
    "RM": Stage(
        recipe="erniekit.recipes.reward",
        sample="pair",
        settings=frozenset({"max_prompt_len"}),
        judges_answers=True,
        reads_pictures=True,
        has_reward_head=True,
    ),
    "PT": Stage(recipe="erniekit.recipes.pretrain", sample="document", balances_load=True),
    "VL-SFT": Stage(
        recipe="erniekit.recipes.sft",
        reads_pictures=True,
        needs_pictures=True,
        balances_load=True,
    ),
    "OCR-VL-SFT": Stage(recipe=None),
}  # fmt: skip
TRAINABLE = tuple(name for name, stage in STAGES.items() if stage.recipe)
