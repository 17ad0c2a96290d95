"""What reads the records of a run: the encoder of its stage, with the template and the reader of
pictures of its model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ernie.chat import VL, VL_THINKING, ChatTemplate
from ernie.checkpoint.hub import resolve
from ernie.config import ErnieConfig
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Processor
from ernie.vision.settings import VisionSettings, font_of
from ernie.vision.sources import MediaError, Sources
from erniekit.config import Run, changed
from erniekit.config.checks import check_every_weight_is_used
from erniekit.data.dialogue import Encoder
from erniekit.data.judged import JudgedEncoder
from erniekit.data.multimodal import PictureReader
from erniekit.data.preference import PairEncoder


def encoder_of(run: Run, tokenizer: Tokenizer, template: ChatTemplate) -> Encoder:
    """What reads the records of a stage with a template: pairs, judged answers, or dialogues."""
    data, p = run.data, run.preferences
    room = data.max_seq_len - 10  # for a prompt
    reader = _reader_of(run)
    if run.stage.sample == "pair":
        is_scored = run.stage.has_reward_head
        return PairEncoder(
            tokenizer,
            template,
            data.max_seq_len,
            max_prompt_tokens=min(p.max_prompt_len or room, room),
            masks_end=p.mask_out_eos_token and not is_scored,
            reads_end=is_scored,
            reader=reader,
        )
    if run.stage.sample == "answer":
        masks_end = p.mask_out_eos_token
        return JudgedEncoder(
            tokenizer, template, data.max_seq_len, masks_end=masks_end, reader=reader
        )
    return Encoder(
        tokenizer,
        template,
        data.max_seq_len,
        # The templates of multimodal models write an answer differently once a dialogue goes on.
        one_answer_per_sample=data.split_multi_turn or reader is not None,
        reader=reader,
    )


def _reader_of(run: Run) -> PictureReader | None:
    """What reads the pictures of a run's records; None where the stage or the model has none."""
    stage, folder = run.model.stage, resolve(run.model.model_name_or_path)
    config = ErnieConfig.from_folder(folder)
    if config.vision_config is not None:
        if not run.stage.reads_pictures:
            raise ConfigError(
                f"stage={stage} trains models of text, and {folder} reads pictures too; use "
                "stage: VL-SFT, which takes records of text as well"
            )
        check_every_weight_is_used(run)
        return PictureReader(config, _processor(run, folder))
    if run.stage.needs_pictures:
        raise ConfigError(
            f"stage={stage} trains a model that reads pictures, which {folder} does not; use a VL "
            "model, or stage: SFT"
        )
    if given := [key for key in changed(run) if hasattr(run.pictures, key)]:
        raise ConfigError(
            f"{', '.join(given)} are about pictures, which {folder} does not "
            "read; leave them out, or use a VL model"
        )
    return None


def template_of(run: Run, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The one that the run names, else that of the model folder."""
    named = {"ernie_vl": VL, "ernie_vl_thinking": VL_THINKING}
    if run.data.chat_template in named:
        return named[run.data.chat_template]
    return ChatTemplate.for_folder(folder, tokenizer)


def _processor(run: Run, folder: Path) -> Processor:
    """How pictures of training records are read: the limits of the model folder, with those that
    the run gives. Any file and public URL that a record names is read.
    """
    p, settings = run.pictures, VisionSettings.from_folder(folder)
    given: dict[str, Any] = {
        "image_min_pixels": p.min_pixels,
        "image_max_pixels": p.max_pixels,
        "video_min_pixels": p.video_min_pixels,
        "video_max_pixels": p.video_max_pixels,
        "video_fps": p.video_fps,
        "video_min_frames": p.video_min_frames,
        "video_max_frames": p.video_max_frames,
        "video_target_frames": p.video_target_frames,
        "video_frames_sample": p.video_frames_sample,
        "render_timestamp": p.render_timestamp,
    }
    try:
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    except MediaError as error:
        raise ConfigError(f"the limits of pictures do not fit: {error}") from None
    return Processor(settings=settings, sources=Sources(folder=Path("/")), font=font_of(folder))
