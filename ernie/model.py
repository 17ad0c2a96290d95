"""The ERNIE 4.5 network: one class and one forward for training and for serving.

    token ids (T,) -> embedding -> blocks -> hidden states (T, D) -> norm, head -> logits (T, V)

Legend: T tokens of the flat batch, D hidden size, V vocabulary.

A batch is flat: sequences stand one after the other and there is no batch dimension and no padding.
Who may look at whom is decided by `attend` (see `ernie.attention`), so the model never knows
whether it trains, reads a prompt or decodes. Parameter names are those of the published `-PT`
checkpoints, with the experts of a layer stacked into two tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.attention import Attend, Attention, packed_causal
from ernie.config import ErnieConfig
from ernie.layers import MLP, Embedding, Linear, RMSNorm
from ernie.moe.layer import MoE
from ernie.moe.router import Routing
from ernie.mtp import MTP
from ernie.rope import Rotary, rotary_tables

if TYPE_CHECKING:
    from ernie.adapters import ActiveAdapters
    from ernie.tokenizer import Tokenizer

# Routing decisions and their bias stay float32 whatever dtype the model is moved to.
KEPT_FLOAT32 = ("mlp.gate.weight", "e_score_correction_bias")


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ErnieConfig, layer: int, *, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config)
            if moe
            else MLP(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        )

    def forward(
        self, x_TD: Tensor, rotary: Rotary, attend: Attend
    ) -> tuple[Tensor, Routing | None]:
        """The stream after this block, and the routing of its experts if it has any."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotary, attend)
        out = self.mlp(self.post_attention_layernorm(x_TD))
        out_TD, routing = out if isinstance(self.mlp, MoE) else (out, None)
        return x_TD + out_TD, routing


class Trunk(nn.Module):
    """Everything under the published prefix `model.`."""

    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i, moe=config.is_moe_layer(i)) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # An MTP block attends under its own layer number, after the main ones.
        depths = range(config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(
            MTP(config, Block(config, config.num_hidden_layers + i, moe=False)) for i in depths
        )


class ErnieModel(nn.Module):
    """A text model of the family, dense or mixture of experts.

    `dtype` is that of the weights. Activations are float32 on a CPU, where bfloat16 products are
    slow and weights are widened on the way into the arithmetic; elsewhere they have the weights'
    dtype.

    Built without values: `ernie.load`, `init_weights` or `load_state_dict` fill it.
    """

    def __init__(
        self,
        config: ErnieConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.vision_config:
            raise ValueError(
                "this model reads images and video, for which there is no network here yet; "
                "load one of the text models (0.3B, 21B-A3B, 300B-A47B)"
            )
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.layout = "pt"  # of the files it was read from
        self.generation_config: dict[str, Any] | None = None  # as in the folder it was loaded from
        self.fused_head: Callable[[Tensor], Tensor] | None = None  # set by `ernie.fused`
        with torch.device(device):
            self.model = Trunk(config)
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size)
        for name, parameter in self.named_parameters():
            if not name.endswith(KEPT_FLOAT32):
                parameter.data = parameter.data.to(dtype)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def activation_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.model.norm.weight.dtype

    def hidden(
        self,
        token_ids_T: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        routings: list[Routing | None] | None = None,
        adapters: ActiveAdapters | None = None,
    ) -> Tensor:
        """Output of the last block, *before* the final norm; `(T, D)`.

        `positions` is `(T,)`, or `(3, T)` for three-dimensional rotary embedding. A list given as
        `routings` receives one entry per layer: the `Routing` of a MoE layer, None of a dense one.
        `adapters` need the inference form of the blocks (`ernie.fused`).
        """
        x_TD = self.model.embed_tokens(token_ids_T).to(self.activation_dtype)
        rotary = self.rotary(positions)
        for i, block in enumerate(self.model.layers):
            changes = () if adapters is None else (adapters.at(i),)
            x_TD, routing = block(x_TD, rotary, attend, *changes)
            if routings is not None:
                routings.append(routing)
        return x_TD

    def hidden_after_next(
        self,
        next_token_ids_T: Tensor,
        hidden_TD: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        depth: int = 0,
    ) -> Tensor:
        """Multi-token prediction: hidden states for the token after `next_token_ids`, before the
        final norm.
        """
        embedded = self.model.embed_tokens(next_token_ids_T).to(self.activation_dtype)
        return self.model.mtp[depth](embedded, hidden_TD, self.rotary(positions), attend)

    def head(self, hidden_TD: Tensor) -> Tensor:
        """Final norm and projection of hidden states to the vocabulary; `(T, V)`, float32."""
        if self.fused_head is not None:
            return self.fused_head(hidden_TD)
        return kernels.linear(self.model.norm(hidden_TD), self.head_weight).float()

    @property
    def head_weight(self) -> nn.Parameter:
        """The projection to the vocabulary `(V, D)`: the embedding's own weight when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def rotary(self, positions: Tensor) -> Rotary:
        c = self.config
        return rotary_tables(positions, c.head_dim, c.rope_theta, c.freq_allocation)

    @torch.no_grad()
    def logits(self, token_ids: Tensor | Iterable[int]) -> Tensor:
        """Next-token logits at every position of one sequence; `(T, V)`, float32."""
        ids_T = torch.as_tensor(
            token_ids if isinstance(token_ids, Tensor) else list(token_ids), device=self.device
        ).long()
        bounds = torch.tensor([0, len(ids_T)], dtype=torch.int32, device=self.device)
        positions = torch.arange(len(ids_T), device=self.device)
        return self.head(self.hidden(ids_T, positions, packed_causal(bounds)))

    @torch.no_grad()
    def init_weights(self, *, seed: int, std: float | None = None) -> None:
        """Random weights, normal with `std` (default `sqrt(1 / (3 D))`), norms one, correction bias
        zero.

        Source: PaddleFormers' initialisation for pre-training. The same seed gives the same model.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        std = std if std is not None else (3 * self.config.hidden_size) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("e_score_correction_bias") or name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
