"""Pictures and clips of requests: fetched and read in threads, beside the event loop.

    messages --Processor, a few at a time--> token ids, PromptPictures --link--> engine's process

What a URL may reach, how many parts a request may hold and how large they become is settled by the
server's flags; a request may only ask for less. Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError
from ernie.vision.prompt import Inputs, Processor, Span
from ernie.vision.settings import VisionSettings, font_of
from ernie.vision.sources import MediaError, Sources
from fastdeploy.config import ServerConfig
from fastdeploy.engine.language import Language
from fastdeploy.errors import RequestError

T = TypeVar("T")

NUM_THREADS = 4  # requests whose pictures are read at a time; each has threads of its own beside
MAX_BYTES = 768 << 20  # of the patches of one request: they cross the link in one frame


class PromptPictures(msgspec.Struct, array_like=True):
    """The pictures of one prompt: what `ernie.vision.prompt.Inputs` has beside token ids."""

    rows: bytearray  # (P, width) uint8
    width: int
    spans: list[Span]

    @classmethod
    def of(cls, inputs: Inputs) -> PromptPictures | None:
        """None for a prompt without pictures. Raises RequestError where they are too large."""
        if not inputs.pictures:
            return None
        size = inputs.pixel_values.nbytes
        if size > MAX_BYTES:
            raise RequestError(
                f"the pictures of the request take {size >> 20} MiB once they are resized; the "
                f"limit is {MAX_BYTES >> 20}: send fewer, or lower max_pixels or max_frames",
                param="messages",
            )
        width = inputs.pixel_values.shape[1]
        return cls(bytearray(inputs.pixel_values.data), width, list(inputs.pictures))

    def inputs(self, prompt_ids: list[int]) -> Inputs:
        """The way back, behind the link; the prompt may have grown at its end."""
        rows = np.frombuffer(self.rows, np.uint8).reshape(-1, self.width)
        grids = np.array([span.grid for span in self.spans], np.int64)
        return Inputs(prompt_ids, [], rows, grids, tuple(self.spans))

    def num_tokens(self) -> dict[str, int]:
        """Tokens of images and of clips, under the names that `usage` has for them."""
        counts = {"image_tokens": 0, "video_tokens": 0}
        for span in self.spans:
            counts[f"{span.kind}_tokens"] += span.stop - span.start
        return counts


class Pictures:
    """How this server reads pictures; `processor` is None where its model reads text only."""

    def __init__(self, config: ServerConfig, language: Language) -> None:
        """Raises ConfigError for settings that the model cannot have."""
        self.processor: Processor | None = None
        if language.template is not None and language.template.reads:
            self.processor = processor_of(config, resolve(language.config.model))
        self.threads = ThreadPoolExecutor(NUM_THREADS, "pictures")

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function that fetches and decodes; the event loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)

    async def close(self) -> None:
        """End the threads without waiting for what they fetch."""
        stop = partial(self.threads.shutdown, wait=False, cancel_futures=True)
        await asyncio.to_thread(stop)


def processor_of(config: ServerConfig, folder: Path) -> Processor:
    """The processor of a model folder within the server's limits. Raises ConfigError."""
    limits = config.media_limits()
    try:
        settings = VisionSettings.from_folder(folder).changed(config.mm_processor_kwargs or {})
        path = config.allowed_local_media_path
        return Processor(
            settings=settings,
            sources=Sources(
                folder=None if path is None else Path(path),
                networks=tuple(config.allowed_media_networks or ()),
                hosts=frozenset(config.allowed_media_domains or ()) or None,
                allows_http=config.media_urls,
                max_image_bytes=config.max_image_mib << 20,
                max_video_bytes=config.max_video_mib << 20,
                timeout_s=config.media_fetch_timeout,
            ),
            font=font_of(folder),
            max_images=limits["image"],
            max_videos=limits["video"],
        )
    except MediaError as error:
        raise ConfigError(f"mm_processor_kwargs: {error}") from None
