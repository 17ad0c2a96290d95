"""Messages with pictures and clips to what the model takes: token ids, pixel rows, grids, spans.

    {"role": "user", "content": [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://..."}},     data:, file: also
        {"type": "video_url", "video_url": {"url": "...", "fps": 1}},
        {"type": "image", "image": b"..." or an opened picture},
        {"type": "video", "video": b"..." or a list of frames}]}

Pictures are fetched and read side by side, then written into the prompt by the chat template:
START, a placeholder (id 100295, also for clips) for each token of the picture, END. Positions and
kinds of tokens are the model's business.

Numpy only: a process that reads pictures for a model elsewhere does without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ernie.chat.messages import ChatError, pictures_of
from ernie.chat.template import PLACEHOLDER, UNTRAINED, ChatTemplate
from ernie.tokenizer import Tokenizer
from ernie.vision.processor import Picture, image_picture, in_threads
from ernie.vision.settings import VisionSettings, font_of
from ernie.vision.sources import MediaError, Sources
from ernie.vision.video import check_num_frames, clip_picture, frames_picture

_PLACE = re.compile(r"<\|(image|video)@placeholder\|>")  # as templates write it
_FETCHES = 8  # at a time, for one dialogue
# What one clip may say about its sampling, beside its url, and the setting that it changes.
_CLIP_OPTIONS = {
    "fps": "video_fps",
    "min_frames": "video_min_frames",
    "max_frames": "video_max_frames",
    "target_frames": "video_target_frames",
    "frames_sample": "video_frames_sample",
    "min_pixels": "video_min_pixels",
    "max_pixels": "video_max_pixels",
}
_IMAGE_OPTIONS = {"min_pixels": "image_min_pixels", "max_pixels": "image_max_pixels"}


@dataclass(frozen=True)
class Span:
    """Where a picture stands in a prompt: tokens `start` to `stop`, rows `first_row` to
    `first_row + t * h * w`. Caches of its features are keyed by `digest`.
    """

    kind: str
    start: int
    stop: int
    first_row: int
    grid: tuple[int, int, int]
    digest: str


@dataclass(frozen=True, eq=False)
class Inputs:
    """A dialogue as the model takes it.

    token_ids, labels: as in `ernie.chat.Encoded`. pixel_values: (P, 588) uint8, all pictures one
    after the other, in order of appearance. grid_thw: (N, 3) int64. pictures: one span for each.
    """

    token_ids: list[int]
    labels: list[int]
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    pictures: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Processor:
    """How pictures of messages are had and read.

    max_images, max_videos: how many one dialogue may hold; None for no limit.
    """

    settings: VisionSettings = field(default_factory=VisionSettings)
    sources: Sources = field(default_factory=Sources)
    font: Path | None = None
    max_images: int | None = None
    max_videos: int | None = None
    memory: dict[int, Picture] | None = None  # of a `remembering` one, by id of the source

    @classmethod
    def from_folder(cls, path: str | Path, **arguments: Any) -> Processor:
        """With the settings and the font of a model folder."""
        return cls(settings=VisionSettings.from_folder(path), font=font_of(path), **arguments)

    def remembering(self) -> Processor:
        """One that reads each source once: for dialogues that share parts, the same objects, which
        have to outlive it.
        """
        return replace(self, memory={})

    def inputs(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> Inputs:
        """The dialogue, rendered with `arguments` of `ChatTemplate.encode`.

        `options` change the limits for this dialogue (`mm_processor_kwargs`); `seed` is for frames
        drawn at random. Raises ChatError, and MediaError naming the part at fault.
        """
        if pictures_of(messages):  # refuse what is wrong before anything is fetched
            template.render(messages, **arguments)
        pictures = self.pictures(messages, options=options, seed=seed)
        sizes = [(picture.kind, picture.num_tokens) for picture in pictures]
        encoded = template.encode(tokenizer, messages, sizes, **arguments)
        places = [(pictures[number], start, stop) for number, start, stop in encoded.pictures]
        return self._joined(encoded.token_ids, encoded.labels, places)

    def prompt_inputs(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        /,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Inputs:
        """A prompt that is written already, as a chat template writes it, with its pictures.

        In a text, control tokens it spells become their ids, and `<|image@placeholder|>` and
        `<|video@placeholder|>` are the places of pictures. In token ids a place is a run of
        placeholder ids, one or as many as the picture has tokens; one behind VIDEO_START is a
        clip's. Images and videos are given as in parts of messages. Raises MediaError.
        """
        mark, video = tokenizer.id_of(PLACEHOLDER), tokenizer.id_of("<|VIDEO_START|>")
        if mark is None:
            raise MediaError(f"the tokenizer has no {PLACEHOLDER}, which stands for pictures")
        ids, runs = _written(prompt, tokenizer, mark, video)
        entries = _entries([kind for kind, *_ in runs], {"image": images, "video": videos})
        pictures = self._read(entries, options, None)
        token_ids: list[int] = []
        places, end = [], 0
        for (_, start, stop), picture, (*_, where) in zip(runs, pictures, entries):
            if stop - start not in (1, picture.num_tokens):
                raise MediaError(
                    f"{where} has {picture.num_tokens} tokens, and {stop - start} placeholders "
                    "stand for it; give one, or as many"
                )
            token_ids += ids[end:start]
            places.append((picture, len(token_ids), len(token_ids) + picture.num_tokens))
            token_ids += [mark] * picture.num_tokens
            end = stop
        token_ids += ids[end:]
        return self._joined(token_ids, [UNTRAINED] * len(token_ids), places)

    def _joined(
        self, token_ids: list[int], labels: list[int], places: Sequence[tuple[Picture, int, int]]
    ) -> Inputs:
        spans, first_row = [], 0
        for picture, start, stop in places:
            spans.append(Span(picture.kind, start, stop, first_row, picture.grid, picture.digest))
            first_row += len(picture.rows)
        ordered = [picture.rows for picture, *_ in places]
        width = 3 * self.settings.patch_size**2
        rows = ordered[0] if len(ordered) == 1 else np.concatenate([_no_rows(width), *ordered])
        grids = np.array([span.grid for span in spans], np.int64).reshape(-1, 3)
        return Inputs(token_ids, labels, rows, grids, tuple(spans))

    def pictures(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> list[Picture]:
        """Those of the messages, in order."""
        return self._read(pictures_of(messages), options, seed)

    def _read(
        self,
        found: Sequence[tuple[str, Any, str]],
        options: Mapping[str, Any] | None,
        seed: int | None,
    ) -> list[Picture]:
        """Pictures of (kind, source, where)."""
        for kind, number, limit in self._excess(found):
            raise ChatError(f"the messages hold {number} parts of {kind}; the limit is {limit}")
        if self.memory is None:
            return self._read_new(found, options, seed)
        new = {id(entry[1]): entry for entry in found if id(entry[1]) not in self.memory}
        self.memory.update(zip(new, self._read_new([*new.values()], options, seed), strict=True))
        return [self.memory[id(source)] for _, source, _ in found]

    def are_too_many(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the messages hold more pictures than a dialogue may."""
        return bool(self._excess(pictures_of(messages)))

    def _excess(self, found: Sequence[tuple[str, Any, str]]) -> list[tuple[str, int, int]]:
        """(kind, number, limit) where the limit is exceeded."""
        counts = Counter(kind for kind, *_ in found)
        limits = {"image": self.max_images, "video": self.max_videos}
        return [
            (kind, counts[kind], limit)
            for kind, limit in limits.items()
            if limit is not None and counts[kind] > limit
        ]

    def _read_new(
        self,
        found: Sequence[tuple[str, Any, str]],
        options: Mapping[str, Any] | None,
        seed: int | None,
    ) -> list[Picture]:
        settings = self.settings.changed(options or {})
        contents = in_threads(self._content, found, num_threads=_FETCHES)

        def read(work: tuple[tuple[str, Any, str], Any]) -> Picture:
            (kind, source, where), content = work
            with _named(where):
                own = _own_options(kind, source) if isinstance(source, Mapping) else {}
                return self._picture(kind, content, settings.changed(own), seed)

        return in_threads(read, list(zip(found, contents)))

    def _content(self, entry: tuple[str, Any, str]) -> Any:
        """The bytes or the opened picture of a part; a list of them for a clip given as frames."""
        kind, source, where = entry
        if isinstance(source, Mapping):
            source = source.get("url")
        with _named(where):
            if isinstance(source, list) and kind == "video":
                check_num_frames(len(source), self.settings)  # before they are fetched
                return [self._bytes(frame, "image") for frame in source]
            return self._bytes(source, kind)

    def _picture(
        self, kind: str, content: Any, settings: VisionSettings, seed: int | None
    ) -> Picture:
        if kind == "image":
            return image_picture(content, settings)
        if isinstance(content, list):
            return frames_picture(content, settings, font=self.font)
        if not isinstance(content, bytes):
            raise MediaError("a clip is given as one opened picture; expected bytes or a list")
        return clip_picture(content, settings, font=self.font, seed=seed)

    def _bytes(self, source: Any, kind: str) -> bytes | Image.Image:
        if isinstance(source, (bytes, Image.Image)):
            return source
        if isinstance(source, Path):
            source = str(source)
        if not isinstance(source, str):
            raise MediaError(f"a part of {kind} holds {type(source).__name__}; expected a URL")
        return self.sources.read(source, kind)


def _written(
    prompt: str | Sequence[int], tokenizer: Tokenizer, mark: int, video: int | None
) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Token ids of a prompt, and the places of pictures in it: kind, first and behind the last."""
    kind_by_place: dict[int, str] = {}
    ids: list[int] = []
    if isinstance(prompt, str):
        for number, piece in enumerate(_PLACE.split(prompt)):  # every other one is a kind
            if number % 2:
                kind_by_place[len(ids)] = piece
                ids.append(mark)
            else:
                ids += tokenizer.encode(piece, allow_special=True)
    else:
        ids += prompt
    runs: list[tuple[str, int, int]] = []
    for i, token in enumerate(ids):
        if token != mark:
            continue
        if runs and runs[-1][2] == i and i not in kind_by_place:
            kind, start, _ = runs.pop()
        else:
            behind = "video" if i and ids[i - 1] == video else "image"
            kind, start = kind_by_place.get(i, behind), i
        runs.append((kind, start, i + 1))
    return ids, runs


def _entries(
    kinds: Sequence[str], given: Mapping[str, Sequence[Any]]
) -> list[tuple[str, Any, str]]:
    """(kind, source, where) for each place of a prompt, in order."""
    for kind, sources in given.items():
        if kinds.count(kind) != len(sources):
            raise MediaError(
                f"the prompt has {kinds.count(kind)} places of kind {kind}, and {len(sources)} are "
                f"given; write <|{kind}@placeholder|> for each"
            )
    entries = []
    for place, kind in enumerate(kinds):
        number = kinds[:place].count(kind)
        entries.append((kind, given[kind][number], f"{kind}[{number}]"))
    return entries


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{where}: {error}") from None


def _own_options(kind: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a part changes for itself. `detail`, of the OpenAI API, has no meaning here."""
    names = _CLIP_OPTIONS if kind == "video" else _IMAGE_OPTIONS
    changed = {}
    for key, value in source.items():
        if key in ("url", "detail"):
            continue
        if key not in names:
            known = ", ".join(("url", *names))
            raise MediaError(f"{key!r} is not a property of a part of {kind}; known: {known}")
        changed[names[key]] = value
    return changed


def _no_rows(width: int) -> np.ndarray:
    return np.empty((0, width), np.uint8)
