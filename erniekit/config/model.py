"""Settings of the model: which one, and what of it is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ernie.quant.scheme import FROZEN
from ernie.settings import ConfigError, option
from erniekit.config.stages import STAGES

COMPUTE_TYPES = ("bf16", "fp8", *FROZEN)
TOWER = "tower"  # of vision, among the parts that are computed again
AUTO = "auto"  # of recompute_granularity
_PART_AGAIN = re.compile(r"(full|full_attn|mlp):(\d{1,3})(?:-(\d{1,3}))?|full:tower")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and what of it is trained."""

    model_name_or_path: str = option(
        "", "Folder of a saved model (-PT or -Paddle layout), or its name on the hub.", path=True
    )
    stage: str = option("SFT", "What kind of training.", choices=tuple(STAGES))
    fine_tuning: str = option(
        "LoRA", "Train small adapters beside frozen weights, or all.", choices=("LoRA", "Full")
    )
    lora: bool | None = option(None, "Older spelling of fine_tuning: true is LoRA, false Full.")
    lora_rank: int = option(8, "Rank of the adapters.", least=1, most=8192)
    lora_alpha: float = option(
        -1, "Adapter scale is alpha / rank; -1: 2 x rank (4 with rslora).", above=0, also=-1
    )
    lora_path: str | None = option(None, "Folder of an adapter to start from.", path=True)
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
    lora_plus_scale: float = option(
        1.0, "LoRA+: learning rate of the B matrices over that of A.", above=0
    )
    lora_dropout: float = option(
        0.0, "Share of what an adapter reads that is dropped.", least=0, below=1
    )
    rslora_plus: bool = option(False, "Short for rslora, lora_plus_scale 4 and lora_alpha 4.")
    compute_type: str = option(
        "bf16",
        "Arithmetic of the run. On a CPU products are float32: LoRA keeps the frozen weights in "
        "bfloat16, Full trains float32 weights and saves bfloat16 ones. For LoRA the frozen "
        "weights can be kept in 8 bits (wint8), experts in 4 and the rest in 8 (wint4/8), or in 4 "
        "bits of a normal distribution (nf4); products are those of the values they stand for. "
        "fp8: Full training whose blocks multiply in 8-bit floats, weights staying as they are.",
        choices=COMPUTE_TYPES,
    )
    quant_input_grad: bool = option(
        False, "With fp8, multiply in it on the way back too, but for the gradients of weights."
    )
    cpu_products: str = option(
        "float32",
        "Products of a CPU run: float32, or bfloat16 with float32 sums, faster on processors with "
        "AVX512-BF16 or AMX and refused on others, and where a reference is compared with. Experts "
        "multiply in float32.",
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
        least=1,
        also=-1,
    )
    recompute: bool = option(
        False, "Forget activations in the forward pass and compute them again in the backward one."
    )
    recompute_granularity: str = option(
        "full",
        "What is computed again: whole blocks (full), the attention layer (full_attn), its "
        "product (core_attn; never stored here, so free), the feed-forward half (mlp), or as much "
        "as the run has to so that it fits plan_memory_gib by its plan (auto).",
        choices=("full", "full_attn", "core_attn", "mlp", "auto"),
    )
    recompute_layers: tuple[str, ...] = option(
        (),
        "In place of recompute_granularity: what each layer computes again, as in "
        "full_attn:0-7,full:8,full:tower (the vision tower).",
    )
    no_recompute_layers: tuple[int, ...] = option(
        (), "Layers that keep their activations.", least=0
    )
    moe_aux_loss_lambda: float = option(
        1e-5,
        "Weight of the load balance loss (full training; not part of the reported loss).",
        least=0,
    )
    moe_orthogonal_loss_lambda: float = option(
        0.0,
        "Weight of the router's orthogonality loss (full training; not reported as loss).",
        least=0,
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
        above=0,
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
        0.0,
        "Weight of the router's z-loss (full training; not part of the reported loss).",
        least=0,
    )
    moe_use_aux_free_update_coef: float | None = option(
        None,
        "Step of the routing bias towards even load after each optimizer step (full only). none: "
        "0.001 in the stages PT and VL-SFT, else 0.",
        least=0,
    )
    num_nextn_predict_layers: int = option(
        0,
        "Multi-token-prediction blocks to train along; the model must have them (full only).",
        least=0,
    )
    multi_token_pred_lambda: float = option(
        0.3, "Weight of the multi-token-prediction loss.", least=0
    )


def parts_again(words: tuple[str, ...]) -> dict[int | str, str]:
    """What `recompute_layers` says of layers and the `TOWER`; ConfigError for what says nothing.

    Attention and feed-forward of a layer are the whole of it.
    """
    found: dict[int | str, str] = {}
    for word in words:
        match = _PART_AGAIN.fullmatch(word)
        what, first, last = match.groups() if match else (None, None, None)
        layers = range(int(first or 0), int(last or first or 0) + 1)
        if match is None or not layers:
            raise ConfigError(
                f"recompute_layers={word} is not known; give full, full_attn or mlp with layers, "
                "as in mlp:0-7, or full:tower"
            )
        for part in layers if what else (TOWER,):
            found[part] = what if what and found.get(part, what) == what else "full"
    return found
