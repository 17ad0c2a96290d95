"""Pictures, part by part, against slow twins: patches, positions, modality, banks of experts; and
what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

import ernie
from ernie.attention import packed_causal
from ernie.fused import FusedMoE, Shard, fuse, fused_block, shallow_copy
from ernie.generate import GrowingCache, generate
from ernie.model import Embeds, ErnieModel
from ernie.models import MODELS, TINY
from ernie.moe.layer import MoE, Split
from ernie.moe.router import Routing
from ernie.quant.scheme import SCHEMES
from ernie.vision.grids import frame_lengths, grids_of, num_rows, pieces
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.resampler import merged_frames
from ernie.vision.vit import normalised, patch_places

CONFIG = TINY["tiny-vl"]
PLACE, START, END = 200, 201, 202
GRIDS = [(1, 4, 6), (4, 2, 4), (1, 2, 2), (2, 6, 4)]
Place = tuple[int, int, int]


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> ErnieModel:
    model = ErnieModel(replace(CONFIG, **changes), dtype=dtype)
    model.init_weights(seed=seed, std=0.2)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("correction_bias"):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def sequence(*parts: int | Place) -> list[int]:
    """Tokens of text, or of a picture with this grid."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += [START, *[PLACE] * num_rows(part), END]
    return ids


IDS = sequence(3, 4, GRIDS[0], 5, GRIDS[1], 6, 7, 8)
PICTURES = GRIDS[:2]


def patches_of(grids: list[Place], seed: int = 0) -> Tensor:
    """Bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (sum(frame_lengths(grids)), 588), generator=generator).byte()


# --- patches ---


def test_patches_lie_in_windows_row_by_row() -> None:
    expected = [
        (window_row * 2 + row, window_column * 2 + column)
        for frames, rows, columns in GRIDS
        for _ in range(frames)
        for window_row, window_column in product(range(rows // 2), range(columns // 2))
        for row, column in product(range(2), range(2))
    ]
    assert patch_places(GRIDS).tolist() == [list(place) for place in expected]


def test_bytes_are_normalised_by_channel_in_float32() -> None:
    patches = patches_of([(1, 2, 2)])
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ours = normalised(patches)
    assert ours.dtype == torch.float32
    for element in (0, 195, 196, 391, 392, 587):
        channel = element // 196
        by_hand = (patches[:, element].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(ours[:, element].double(), by_hand, atol=1e-6, rtol=0)
    assert normalised(ours) is ours, "floating point rows are normalised already"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_and_frames_do_not_see_one_another(dtype: torch.dtype) -> None:
    model, patches = tiny(dtype=dtype), patches_of(GRIDS)
    assert model.vision_model is not None
    with torch.no_grad():
        together = model.vision_model(patches, GRIDS, torch.float32)
        frames = [(1, h, w) for t, h, w in GRIDS for _ in range(t)]
        parts = zip(patches.split(frame_lengths(GRIDS)), frames, strict=True)
        apart = [model.vision_model(rows, [grid], torch.float32) for rows, grid in parts]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    moved = patches.clone()
    moved[0] = 255 - moved[0]  # the first picture, of 24 patches
    with torch.no_grad():
        other = model.vision_model(moved, GRIDS, torch.float32)
    changed = (other - together).abs().amax(1) > 1e-4
    assert changed[:24].all() and not changed[24:].any()


def test_frames_are_merged_in_pairs_and_an_image_with_itself() -> None:
    first, second, start = [], [], 0
    for frames, rows, columns in GRIDS:
        size = rows * columns // 4
        for frame in range(0, frames, 2):
            first += range(start + frame * size, start + (frame + 1) * size)
            after = min(frame + 1, frames - 1)
            second += range(start + after * size, start + (after + 1) * size)
        start += frames * size
    assert merged_frames(GRIDS).tolist() == [first, second]
    assert len(first) == sum(map(num_rows, GRIDS))


@pytest.mark.parametrize("most_patches", [1, 16, 40, 10**6])
def test_pieces_of_pictures_give_the_rows_of_the_whole(
    most_patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids, patches = [*GRIDS, (6, 2, 2)], patches_of([*GRIDS, (6, 2, 2)])
    parts = pieces(grids, most_patches)
    assert (parts == [grids]) == (most_patches > 1000)
    assert [n for part in parts for n in frame_lengths(part)] == frame_lengths(grids)
    for part in parts:
        num_units = sum(frames // 2 or 1 for frames, _, _ in part)
        assert num_units == 1 or sum(frame_lengths(part)) <= most_patches
        assert grids_of(part) == part, "no pair of frames is torn"
    model = tiny()
    with torch.no_grad():
        whole = model.picture_rows(patches, grids)
        monkeypatch.setattr("ernie.model.MOST_PATCHES", most_patches)
        in_parts = model.picture_rows(patches, grids)
    torch.testing.assert_close(in_parts, whole, atol=1e-5, rtol=1e-5)


# --- positions and modality ---


def walked(ids: list[int], grids: list[Place]) -> list[Place]:
    """Positions, token by token, as the release's processor counts."""
    found: list[Place] = []
    todo, at = list(grids), 0
    while at < len(ids):
        start = max((max(place) + 1 for place in found), default=0)
        if ids[at] != PLACE:
            found.append((start, start, start))
            at += 1
            continue
        frames, rows, columns = todo.pop(0)
        for t in range(max(frames // 2, 1)):
            for h in range(rows // 2):
                for w in range(columns // 2):
                    found.append((start + t, start + h, start + w))
                    at += 1
    return found


@pytest.mark.parametrize("seed", range(20))
def test_positions_equal_those_counted_token_by_token(seed: int) -> None:
    random = np.random.default_rng(seed)
    parts: list[int | Place] = []
    for _ in range(random.integers(0, 12)):
        frames = int(random.choice([1, 1, 2, 4, 20]))
        grid = (frames, *(2 * int(n) for n in random.integers(1, 5, size=2)))
        parts.append(grid if random.random() < 0.5 else int(random.integers(0, 190)))
    grids = [part for part in parts if isinstance(part, tuple)]
    ids = sequence(*parts)
    if seed % 2:  # pictures may stand side by side
        ids = [token for token in ids if token not in (START, END)]
    ours = positions_of(ids, grids, CONFIG)
    assert ours.dtype == np.int64 and ours.shape == (3, len(ids))
    assert ours.T.tolist() == [list(place) for place in walked(ids, grids)]


def test_positions_of_the_example_in_the_module() -> None:
    ids = [1, 2, START, *[PLACE] * 6, END, 3]
    assert positions_of(ids, [(1, 4, 6)], CONFIG).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert modality_of(ids, CONFIG).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert is_placeholder(ids, CONFIG).nonzero()[0].tolist() == [3, 4, 5, 6, 7, 8]


def test_markers_of_the_released_models_go_to_the_vision_experts() -> None:
    config = MODELS["ERNIE-4.5-VL-28B-A3B"].config
    ids = [100294, 100295, 100296, 101303, 101304, 101305, 101306, 101307, 101308, 103367]
    assert modality_of(ids, config).tolist() == [0, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    assert is_placeholder(ids, config).nonzero()[0].tolist() == [1, 9]


# --- banks of experts ---


def moe_layer(seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    layer = MoE(CONFIG)
    for name, parameter in layer.named_parameters():
        parameter.data.normal_(0, 0.05 if name.endswith("bias") else 0.3)
    return layer


MODALITY = torch.tensor([0, 1, 1, 0, 2, 0, 0, 1, 2, 0, 0])


def test_layer_with_two_banks_equals_a_loop_over_tokens() -> None:
    layer, x = moe_layer(), torch.randn(len(MODALITY), 40)
    out, routing = layer(x, Split.of(MODALITY))
    assert layer.vision_gate is not None and layer.vision_experts is not None
    banks = [(layer.gate, layer.experts), (layer.vision_gate, layer.vision_experts)]
    for t, kind in enumerate(MODALITY.clamp(max=1).tolist()):
        (gate, experts), row = banks[kind], layer.moe_statics.e_score_correction_bias[kind]
        probs = (gate.weight @ x[t]).softmax(0)
        chosen = (probs + row).topk(3).indices
        expected = torch.zeros(40)
        for expert in chosen.tolist():
            left, right = (experts.gate_up_proj[expert] @ x[t]).chunk(2)
            hidden = torch.nn.functional.silu(left) * right
            weight = probs[expert] / probs[chosen].sum()
            expected += weight * (experts.down_proj[expert] @ hidden)
        assert layer.shared_experts is not None
        expected += layer.shared_experts(x[t : t + 1])[0]
        torch.testing.assert_close(out[t], expected, atol=1e-5, rtol=1e-5)
    assert [len(bank.experts_TK) for bank in routing.banks] == [6, 5]
    assert [int(bank.load_E.sum()) for bank in routing.banks] == [18, 15]


@pytest.mark.parametrize("modality", [[1, 2, 1], [0, 0, 0], [1, 0]])
def test_banks_without_tokens(modality: list[int]) -> None:
    layer, x = moe_layer(), torch.randn(len(modality), 40, requires_grad=True)
    split = Split.of(torch.tensor(modality))
    assert (split is None) == (not any(modality))
    out, routing = layer(x, split)
    one_by_one = [
        layer(x[t : t + 1], Split.of(torch.tensor([k])))[0] for t, k in enumerate(modality)
    ]
    torch.testing.assert_close(out, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert len(routing.banks) == 1 + any(modality)


def test_a_token_depends_on_the_weights_of_its_own_bank_only() -> None:
    layer, x = moe_layer(), torch.randn(len(MODALITY), 40)
    before, _ = layer(x, Split.of(MODALITY))
    is_vision = MODALITY != 0
    for prefix, touched in (("vision_", is_vision), ("", ~is_vision)):
        other = moe_layer()
        for name in (f"{prefix}gate.weight", f"{prefix}experts.down_proj"):
            other.get_parameter(name).data.mul_(-1.5)
        other.moe_statics.e_score_correction_bias.data[int(prefix != "")] += torch.arange(8) * 9.0
        after, _ = other(x, Split.of(MODALITY))
        assert torch.equal(after[~touched], before[~touched])
        assert ((after - before)[touched].abs().amax(1) > 1e-3).all()


def test_text_of_a_multimodal_model_is_that_of_a_text_model_bit_for_bit() -> None:
    """Same weights, same path: what a text-only batch does not need costs it nothing."""
    model = tiny()
    text = replace(
        CONFIG, vision_config=None, rope_3d=False, moe_num_experts=8, moe_intermediate_size=24,
        moe_layer_start_index=1, moe_layer_end_index=2,
    )  # fmt: skip
    twin = ErnieModel(text, dtype=torch.float32)
    for name, parameter in twin.named_parameters():
        weight = model.get_parameter(name).data
        parameter.data = weight[:1] if name.endswith("correction_bias") else weight
    ids = torch.arange(50) * 7 % 190
    assert torch.equal(model.logits(ids), twin.logits(ids))
    prompt = model.prompt(ids)
    assert prompt.modality_T is not None and Split.of(prompt.modality_T) is None


def test_routings_report_both_banks_of_every_layer() -> None:
    model, routings = tiny(), list[Routing | None]()
    p = model.prompt(IDS, patches_of(PICTURES), PICTURES)
    bounds = torch.tensor([0, len(IDS)], dtype=torch.int32)
    model.hidden(
        p.token_ids_T, p.positions, packed_causal(bounds),
        modality=p.modality_T, embeds=p.embeds, routings=routings,
    )  # fmt: skip
    assert routings[0] is None and len(routings) == 3
    num_vision = int(modality_of(IDS, CONFIG).sum())
    for routing in routings[1:]:
        assert routing is not None
        sizes = [len(bank.experts_TK) for bank in routing.banks]
        assert sizes == [len(IDS) - num_vision, num_vision]


# --- the whole ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, "wint8"])
def test_inference_form_equals_the_plain_one(dtype: torch.dtype, scheme: str | None) -> None:
    plain = tiny(dtype=dtype)
    expected = plain.logits(IDS, patches_of(PICTURES), PICTURES)
    fused = fuse(shallow_copy(plain), SCHEMES[scheme] if scheme else None)
    logits = fused.logits(IDS, patches_of(PICTURES), PICTURES)
    share = float((logits - expected).norm() / expected.norm())
    assert share < (0.1 if scheme else 1e-4), f"off by {share:.2e}"
    assert torch.equal(plain.logits(IDS, patches_of(PICTURES), PICTURES), expected)


def test_experts_of_vision_are_sliced_for_ranks_like_those_of_text() -> None:
    plain = tiny(moe_intermediate_size=(24, 12), tie_word_embeddings=False)
    layer = plain.model.layers[1]
    x, split = torch.randn(len(MODALITY), 40), Split.of(MODALITY)
    expected = x + layer.mlp(layer.post_attention_layernorm(x), split)[0]
    total = torch.zeros_like(x)
    for rank in range(2):
        block = fused_block(layer, shard=Shard(rank, 2))
        assert isinstance(block.mlp, FusedMoE)
        total += block.mlp(x, block.post_norm, split=split)
    torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (9,), (len(IDS) - 1,), (4, 7), (12, 14, 15)])
def test_prompt_read_in_chunks_equals_one(cuts: tuple[int, ...], is_fused: bool) -> None:
    """Also where a cut goes through a picture, and a chunk is all picture: rows and places are the
    caller's to share out.
    """
    model = tiny()
    expected = model.logits(IDS, patches_of(PICTURES), PICTURES)
    model = fuse(model) if is_fused else model
    p = model.prompt(IDS, patches_of(PICTURES), PICTURES)
    assert p.embeds is not None and p.modality_T is not None
    cache, parts = GrowingCache(), []
    with torch.no_grad():
        for begin, end in pairwise((0, *cuts, len(IDS))):
            inside = (p.embeds.places_L >= begin) & (p.embeds.places_L < end)
            embeds = Embeds(p.embeds.rows_LD[inside], p.embeds.places_L[inside] - begin)
            parts.append(
                model.hidden(
                    p.token_ids_T[begin:end], p.positions[:, begin:end], cache,
                    modality=p.modality_T[begin:end], embeds=embeds,
                )
            )  # fmt: skip
        logits = model.head(torch.cat(parts))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_pictures_may_be_bytes_or_normalised_and_decide_what_is_said() -> None:
    model, patches = tiny(), patches_of(PICTURES)
    logits = model.logits(IDS, patches, PICTURES)
    assert torch.equal(
        logits, model.logits(torch.tensor(IDS), normalised(patches), torch.tensor(PICTURES))
    )
    other = model.logits(IDS, patches_of(PICTURES, seed=1), PICTURES)
    unseen = IDS.index(PLACE)
    assert torch.equal(other[:unseen], logits[:unseen]) and not torch.equal(other, logits)
    assert (
        len(list(generate(model, IDS, max_tokens=3, pixel_values=patches, grid_thw=PICTURES))) == 3
    )


def test_initialisation_is_that_of_the_seed() -> None:
    def made(seed: int) -> ErnieModel:
        model = ErnieModel(CONFIG, dtype=torch.float32)
        model.init_weights(seed=seed)
        return model

    first, again, other = (dict(made(seed).named_parameters()) for seed in (0, 0, 1))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if parameter.dim() == 1 or name.endswith("correction_bias"):
            is_zero = name.endswith("bias")
            assert (parameter == (0 if is_zero else 1)).all(), name
        else:
            width = 16 if name.startswith("vision_model.") else 40
            assert parameter.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.2), name
            assert not torch.equal(parameter, other[name]), name


def test_both_routers_and_the_bias_stay_float32(tmp_path) -> None:
    ernie.save(tiny(), tmp_path)
    model = ernie.load(tmp_path)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"model.layers.{i}.mlp.{name}"
        for i in (1, 2)
        for name in ("gate.weight", "vision_gate.weight", "moe_statics.e_score_correction_bias")
    }


@pytest.mark.parametrize(
    ("ids", "grids", "changes", "words"),
    [
        (IDS, PICTURES, {"patches": 47}, "47 x 588, but the grids have 56 patches of 588"),
        (IDS, PICTURES, {"elements": 587}, "56 x 587, but the grids have"),
        (IDS, [(1, 4, 6), (3, 2, 4)], {}, "grid 3 x 2 x 4 of picture 2 has an odd number of fr"),
        (IDS, [(1, 4, 5)], {}, "grid 1 x 4 x 5 of picture 1 .* no multiple of 2"),
        (IDS, [(1, 0, 6)], {}, "three positive numbers"),
        (IDS, [(4, 6)], {}, "grid 4 x 6 of picture 1 must be three"),
        (IDS, GRIDS[:1], {}, "4 placeholder tokens are left behind those of 1 pictures"),
        (IDS, GRIDS[:3], {}, "picture 3 with grid 1 x 2 x 2 needs 1 placeholder tokens .* 0 stand"),
        (IDS[:6], GRIDS[:1], {}, "needs 6 placeholder tokens in a row, but 3 stand at token 3"),
        ([1, 2], [], {"patches": 4}, "4 x 588, but the grids have 0 patches"),
        (IDS, PICTURES, {"dtype": torch.int64}, "pixel_values are int64; give bytes"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_in_one_sentence(ids, grids, changes, words) -> None:
    num = changes.get("patches") or sum(g[0] * g[1] * g[-1] for g in grids)
    dtype = changes.get("dtype", torch.uint8)
    patches = torch.zeros(num, changes.get("elements", 588), dtype=dtype)
    with pytest.raises(ValueError, match=words) as caught:
        tiny().logits(ids, patches, grids)
    assert str(caught.value).count("\n") == 0


def test_pictures_for_a_text_model_and_halves_of_a_picture_are_refused() -> None:
    patches = patches_of(PICTURES)
    text = ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    with pytest.raises(ValueError, match="this is a text model"):
        text.logits([1, 2], patches, PICTURES)
    with pytest.raises(ValueError, match="both pixel_values and grid_thw"):
        tiny().logits(IDS, patches)
    with pytest.raises(ValueError, match="10 placeholder tokens are left"):
        tiny().logits(IDS)


def test_arrays_are_taken_and_no_pictures_at_all() -> None:
    """As the processor hands them over."""
    model, patches = tiny(), patches_of(PICTURES)
    ours = model.logits(IDS, patches.numpy(), np.array(PICTURES))
    assert torch.equal(ours, model.logits(IDS, patches, PICTURES))
    none = (np.zeros((0, 588), np.uint8), np.zeros((0, 3), np.int64))
    assert torch.equal(model.logits([1, 2, 3], *none), model.logits([1, 2, 3]))
    text = ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    text.init_weights(seed=0)
    assert torch.equal(text.logits([1, 2, 3], *none), text.logits([1, 2, 3]))


def test_grids_come_as_tensors_arrays_and_lists() -> None:
    for form in (torch.tensor(GRIDS), np.array(GRIDS), [list(g) for g in GRIDS], GRIDS):
        assert grids_of(form) == GRIDS
