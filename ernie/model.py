"""The ERNIE 4.5 network: one class and one forward for training and for serving.

    token ids (T,) -> embedding -> blocks -> hidden states (T, D) -> norm, head -> logits (T, V)
                          ^
    patches (P, C) -> vision tower -> resampler -> rows (L, D) in place of placeholder tokens

Legend: T tokens of the flat batch, D hidden size, V vocabulary, P patches of C elements, L rows
that pictures (images and videos) become.

A batch is flat: sequences stand one after the other and there is no batch dimension and no padding.
Who may look at whom is decided by `attend` (see `ernie.attention`), so the model never knows
whether it trains, reads a prompt or decodes. Parameter names are those of the published `-PT`
checkpoints, with the experts of a layer stacked into two tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.attention import Attend, Attention, packed_causal
from ernie.config import ErnieConfig
from ernie.layers import MLP, Embedding, Linear, RMSNorm
from ernie.moe.layer import MoE, Split
from ernie.moe.router import Routing
from ernie.mtp import MTP
from ernie.rope import Rotary, rotary_tables
from ernie.vision.grids import Grids, frame_lengths, grids_of, pieces
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.resampler import Resampler
from ernie.vision.vit import VisionTower

if TYPE_CHECKING:
    from ernie.adapters import ActiveAdapters
    from ernie.tokenizer import Tokenizer

# Routing decisions and their bias stay float32 whatever dtype the model is moved to.
KEPT_FLOAT32 = ("mlp.gate.weight", "mlp.vision_gate.weight", "e_score_correction_bias")

# Patches that go through the vision tower at a time: memory does not grow with a video's length.
MOST_PATCHES = 16_384

TEXT_ONLY = "this is a text model; pictures need one of the VL models"


class Embeds(NamedTuple):
    """Rows that stand in place of the embeddings of some tokens of a batch."""

    rows_LD: Tensor
    places_L: Tensor  # int64, indices of tokens


class Prompt(NamedTuple):
    """What `ErnieModel.hidden` takes for one sequence."""

    token_ids_T: Tensor
    positions: Tensor  # (T,) or (3, T)
    modality_T: Tensor | None
    embeds: Embeds | None


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
        self, x_TD: Tensor, rotary: Rotary, attend: Attend, *, split: Split | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The stream after this block, and the routing of its experts if it has any. `split` parts
        the tokens by modality where a batch has tokens of vision.
        """
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotary, attend)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            out_TD, routing = self.mlp(normed_TD, split)
            return x_TD + out_TD, routing
        return x_TD + self.mlp(normed_TD), None


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
        self.resampler_model = Resampler(config) if config.vision_config else None


class ErnieModel(nn.Module):
    """A model of the family: dense or mixture of experts, of text or of text, images and video.

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
            vision = config.vision_config
            self.vision_model = VisionTower(vision) if vision else None
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
        modality: Tensor | None = None,
        embeds: Embeds | None = None,
        routings: list[Routing | None] | None = None,
        adapters: ActiveAdapters | None = None,
    ) -> Tensor:
        """Output of the last block, *before* the final norm; `(T, D)`.

        `positions` is `(T,)`, or `(3, T)` for three-dimensional rotary embedding. `modality` is
        `(T,)`, 0 for tokens of text and any other number for those of vision; None says that all
        are text. `embeds` are rows in place of embeddings, those of pictures. A list given as
        `routings` receives one entry per layer: the `Routing` of a MoE layer, None of a dense one.
        `adapters` need the inference form of the blocks (`ernie.fused`).
        """
        x_TD = self.model.embed_tokens(token_ids_T).to(self.activation_dtype)
        if embeds is not None:
            x_TD = x_TD.index_copy(0, embeds.places_L, embeds.rows_LD.to(x_TD.dtype))
        rotary, split = self.rotary(positions), Split.of(modality)
        for i, block in enumerate(self.model.layers):
            changes = () if adapters is None else (adapters.at(i),)
            x_TD, routing = block(x_TD, rotary, attend, *changes, split=split)
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

    def picture_rows(self, pixel_values_PC: Tensor, grids: Grids) -> Tensor:
        """What the language model sees of pictures: rows `(L, D)`, picture after picture.

        `pixel_values` are the patches of all pictures in the order of `ernie.vision.grids`: bytes,
        or floating point where they are normalised already. Raises ValueError for a text model or
        where patches and grids do not belong together.
        """
        if self.vision_model is None:
            raise ValueError(TEXT_ONLY)
        assert self.model.resampler_model is not None
        self.vision_model.check(pixel_values_PC, grids)
        parts = pieces(grids, MOST_PATCHES)
        patches = pixel_values_PC.split([sum(frame_lengths(part)) for part in parts])
        rows = []
        for part_PC, part in zip(patches, parts, strict=True):
            x_PW = self.vision_model(part_PC, part, self.activation_dtype)
            rows.append(self.model.resampler_model(x_PW, part))
        return torch.cat(rows)

    def prompt(
        self,
        token_ids: Tensor | Iterable[int],
        pixel_values: Tensor | np.ndarray | None = None,
        grid_thw: Tensor | np.ndarray | Iterable[Iterable[int]] | None = None,
    ) -> Prompt:
        """One sequence, with its pictures in order of appearance, as `hidden` takes it.

        `token_ids` have a placeholder (`im_patch_id`) for every row of `picture_rows`, which takes
        `pixel_values`; `grid_thw` is `(N, 3)`: frames, rows and columns of patches of each picture.
        Raises ValueError where the three do not belong together.
        """
        ids = token_ids if isinstance(token_ids, Tensor) else torch.tensor([*token_ids])
        if (pixel_values is None) != (grid_thw is None):
            raise ValueError("pictures need both pixel_values and grid_thw; one of them is missing")
        patches_PC = None if pixel_values is None else torch.as_tensor(pixel_values)
        has_pictures = patches_PC is not None and len(patches_PC) > 0
        vision, ids_T = self.config.vision_config, ids.to(self.device).long()
        if vision is None:
            if has_pictures:
                raise ValueError(TEXT_ONLY)
            return Prompt(ids_T, torch.arange(len(ids_T), device=self.device), None, None)
        grids = grids_of(() if grid_thw is None else grid_thw, vision.spatial_merge_size)
        on_host = ids.cpu().numpy()
        positions, modality, places_L = (
            torch.from_numpy(found).to(self.device)
            for found in (
                positions_of(on_host, grids, self.config),
                modality_of(on_host, self.config),
                is_placeholder(on_host, self.config).nonzero()[0],
            )
        )
        embeds = None
        if patches_PC is not None and (has_pictures or grids):
            embeds = Embeds(self.picture_rows(patches_PC, grids), places_L)
        return Prompt(ids_T, positions, modality, embeds)

    @torch.no_grad()
    def logits(
        self,
        token_ids: Tensor | Iterable[int],
        pixel_values: Tensor | np.ndarray | None = None,
        grid_thw: Tensor | np.ndarray | Iterable[Iterable[int]] | None = None,
    ) -> Tensor:
        """Next-token logits at every position of one sequence; `(T, V)`, float32.

        Pictures in it as for `prompt`.
        """
        prompt = self.prompt(token_ids, pixel_values, grid_thw)
        bounds = torch.tensor([0, len(prompt.token_ids_T)], dtype=torch.int32, device=self.device)
        return self.head(self.read(prompt, packed_causal(bounds)))

    def read(self, prompt: Prompt, attend: Attend) -> Tensor:
        """`hidden` of a prompt."""
        ids_T, positions, modality_T, embeds = prompt
        return self.hidden(ids_T, positions, attend, modality=modality_T, embeds=embeds)

    @torch.no_grad()
    def init_weights(self, *, seed: int, std: float | None = None) -> None:
        """Random weights, normal with `std` (default `sqrt(1 / (3 D))`, with the vision tower's own
        width for D there), norms one, biases zero.

        Source: PaddleFormers' initialisation for pre-training. The same seed gives the same model.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        vision = self.config.vision_config
        width = self.config.hidden_size
        std_text, std_tower = (
            std if std is not None else (3 * size) ** -0.5
            for size in (width, vision.embed_dim if vision else width)
        )
        for name, parameter in self.named_parameters():
            if name.endswith("e_score_correction_bias") or name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                own = std_tower if name.startswith("vision_model.") else std_text
                parameter.normal_(0.0, own, generator=generator)
