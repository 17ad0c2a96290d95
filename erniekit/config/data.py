"""Settings of the data: files, rows, pictures, and what `erniekit data` shows of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ernie.settings import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from and how they fill a batch."""

    train_dataset_type: tuple[str, ...] = option(
        ("erniekit",),
        "Format of each training file: erniekit, alpaca, messages, sharegpt or reasoning_gym; "
        "erniekit or pretrain for plain text (stage PT); comma list.",
    )
    train_dataset_path: tuple[str, ...] = option(
        (),
        "Training files (.jsonl, .json, .gz, and .txt for stage PT); comma list. Of reasoning_gym "
        "a task and its settings, as in chain_sum?size=2000&seed=1&max_terms=2.",
        path=True,
    )
    train_dataset_prob: tuple[float, ...] = option(
        (1.0,),
        "Weight of each training file in mixing: share of the records, for PT of the text.",
        least=0,
    )
    eval_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each evaluation file; comma list."
    )
    eval_dataset_path: tuple[str, ...] = option((), "Evaluation files; comma list.", path=True)
    eval_dataset_prob: tuple[float, ...] = option(
        (1.0,), "Weight of each evaluation file; 0 leaves it out, others are read whole.", least=0
    )
    input_dir: str | None = option(
        None,
        "Documents of token ids for stage PT instead of files: weight prefix weight prefix .., "
        "each prefix of a .bin and an .idx file (Megatron's format).",
    )
    split: tuple[float, ...] = option(
        (950.0, 50.0),
        "Shares of the documents of input_dir for training, evaluation, neither.",
        least=0,
    )
    text_dataset_type: tuple[str, ...] = option(
        ("erniekit",), "Format of each file of text alone for stage VL-SFT; comma list."
    )
    text_dataset_path: tuple[str, ...] = option(
        (), "Files of text alone that are mixed in (stage VL-SFT); comma list.", path=True
    )
    text_dataset_prob: tuple[float, ...] = option(
        (1.0,), "Weight of each of them in their share.", least=0
    )
    modality_ratio: tuple[float, ...] = option(
        (1.0, 1.0),
        "Shares of the records that are of text_dataset_path and with pictures.",
        least=0,
    )
    chat_template: str | None = option(
        None,
        "Template of a multimodal model whose folder has none or another; none: the folder's.",
        choices=(None, "ernie_vl", "ernie_vl_thinking"),
    )
    max_seq_len: int = option(
        4096,
        "Tokens of a packed row; a dialogue is cut to fit, a document goes on in the next.",
        least=8,
    )
    packing: bool = option(True, "Put several dialogues into one row; they never see each other.")
    greedy_intokens: bool = option(
        True, "Pack a buffer of dialogues by best room (true) or in their order (false)."
    )
    truncate_packing: bool = option(
        True,
        "Stage PT: fill rows to the last place, cutting documents there (true), or cut only those "
        "that are longer than a row.",
    )
    buffer_size: int = option(
        500,
        "Dialogues held for greedy packing; full rows of documents held to be shuffled.",
        least=1,
    )
    padding: bool = option(
        False, "Fill every batch to batch_size x max_seq_len tokens, for steps of a fixed shape."
    )
    mix_strategy: str = option(
        "random",
        "How files are mixed: draws by weight (random), each once (concat), by weight until the "
        "first (interleave_under) or every file (interleave_over) has been used up.",
        choices=("random", "concat", "interleave_under", "interleave_over"),
    )
    random_shuffle: bool = option(True, "Shuffle each file anew in every epoch.")
    num_samples_each_epoch: int = option(
        6_000_000, "Draws in an epoch of random mixing; never more than there are records.", least=1
    )
    split_multi_turn: bool = option(
        False, "One sample per trained answer, earlier thoughts dropped by the chat template."
    )
    max_bad_data_share: float = option(
        0.02,
        "Share of unusable records above which training stops; they are always reported.",
        least=0,
        most=1,
    )
    max_estimate_samples: int = option(
        100_000,
        "Records read to find max_steps, to count faults and to compare with evaluation.",
        least=1,
    )
    dataloader_num_workers: int = option(
        0, "Above 0: batches are prepared by a background thread.", least=0
    )
    prefetch_factor: int = option(2, "Batches prepared ahead by each worker.", least=0)

    def _named(self, split: str) -> list[tuple[str, str, float]]:
        names = (getattr(self, f"{split}_dataset_{x}") for x in ("type", "path", "prob"))
        return list(zip(*names))

    def files(self, split: str) -> list[tuple[str, str, float]]:
        """Kind, path and weight of everything a split ("train" or "eval") is read from.

        A prefix of `input_dir` has the kind "indexed". Raises ConfigError for one that is not a
        list of weights and prefixes.
        """
        if self.input_dir is None:
            files = self._named(split)
            if split == "train" and self.text_dataset_path:
                return [
                    (kind, path, share * weight / sum(w for *_, w in part))
                    for share, part in zip(self.modality_ratio, (self._named("text"), files))
                    for kind, path, weight in part
                ]
            return files
        if split == "eval" and not sum(self.split[1:2]):
            return []
        words = self.input_dir.split()
        words = ["1", *words] if len(words) == 1 else words
        try:
            pairs = [(float(w), prefix) for w, prefix in zip(words[::2], words[1::2], strict=True)]
        except ValueError:
            raise ConfigError(
                f"input_dir={self.input_dir!r} is not a list of weights and prefixes; write it as "
                "in 0.4 data/part0 0.6 data/part1"
            ) from None
        return [("indexed", os.path.expanduser(prefix), weight) for weight, prefix in pairs]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures and clips of the records are read (stage: VL-SFT, and DPO, KTO and RM of a VL
    model); limits that are not given are those of the model folder.
    """

    min_pixels: int | None = option(None, "Fewest pixels of an image after resizing.", least=1)
    max_pixels: int | None = option(None, "Most pixels of an image after resizing.", least=1)
    video_min_pixels: int | None = option(None, "Fewest pixels of a frame after resizing.", least=1)
    video_max_pixels: int | None = option(None, "Most pixels of a frame after resizing.", least=1)
    video_fps: float = option(2.0, "Frames taken of a second of a clip.", above=0)
    video_min_frames: int = option(16, "Fewest frames of a clip, if it has as many.", least=1)
    video_max_frames: int = option(480, "Most frames of a clip.", least=1)
    video_target_frames: int = option(
        -1, "Exactly so many frames; -1: by video_fps.", least=1, also=-1
    )
    video_frames_sample: str = option(
        "middle",
        "Which frame stands for its part of a clip; rand is drawn once for each record.",
        choices=("leading", "middle", "rand"),
    )
    render_timestamp: bool = option(True, "Draw the time on frames.")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `erniekit data` does: show samples token by token, write token ids, or else go through
    the files.
    """

    show: int = option(
        0, "Samples to show, in the order of training, packed into rows; 0: none.", least=0
    )
    sample: str | None = option(
        None,
        "File and line of a record to show, as in data/train.jsonl:17; with what is cut off.",
        path=True,
    )
    dataset_output_dir: str | None = option(
        None,
        "Folder for the documents of the files (stage PT) as token ids, each file a prefix for "
        "input_dir.",
        path=True,
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that go through the files; none: one for each processor.", least=1
    )
