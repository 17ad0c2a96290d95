"""The multi-token-prediction block: from a token's hidden state and the next token, the token after
that.

    e = emb_norm(embed(token[t + 1]))        g = hidden_norm(hidden[t])   (before the final norm)
    z = block(proj([e ; g]))                 logits of token t + 2 = head(norm(z))

Embedding, final norm and head are the main model's. Used in training as a second loss and in
serving to draft tokens. Source: PaddleFormers `ernie4_5_moe` (the published code of some servers
differs and drafts worse).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernie.attention import Attend
from ernie.config import ErnieConfig
from ernie.layers import Linear, RMSNorm
from ernie.rope import Rotary


class MTP(nn.Module):
    """One prediction depth. Its block is dense whatever the main layers are.

    `block` is built by the caller, because `ernie.model` defines blocks in terms of this package's
    layers.
    """

    def __init__(self, config: ErnieConfig, block: nn.Module) -> None:
        super().__init__()
        self.emb_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.linear_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block

    def forward(
        self, next_embedding_TD: Tensor, hidden_TD: Tensor, rotary: Rotary, attend: Attend
    ) -> Tensor:
        """Hidden states `(T, D)`, before the final norm, for the token after the next one."""
        both = torch.cat((self.emb_norm(next_embedding_TD), self.hidden_norm(hidden_TD)), dim=-1)
        out_TD, _ = self.block(self.linear_proj(both), rotary, attend)
        return out_TD
