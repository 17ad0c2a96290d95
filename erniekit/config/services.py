"""Settings around training: generating, serving, exporting, reporting."""

from __future__ import annotations

from dataclasses import dataclass

from ernie.settings import option


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `erniekit chat` asks of the server."""

    max_new_tokens: int = option(1024, "Most tokens of an answer.", least=1)
    min_tokens: int = option(0, "Fewest tokens of an answer.", least=0)
    temperature: float = option(0.95, "Randomness; 0 takes the likeliest token.", least=0)
    top_p: float = option(
        0.7, "Draw from the likeliest tokens that hold this much probability.", least=0, most=1
    )
    frequency_penalty: float = option(0.0, "Penalty by count of a token's uses.", least=-2, most=2)
    presence_penalty: float = option(0.0, "Penalty for a token used before.", least=-2, most=2)
    repetition_penalty: float = option(1.0, "Factor against tokens used before.", above=0)
    stream: bool = option(True, "Print words as they come.")
    enable_thinking: bool = option(False, "Let a thinking model think first.")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What `erniekit server` starts: a fastdeploy server on this machine."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8188, "Port to listen on.", least=0, most=65535)
    max_model_len: int = option(2048, "Most tokens of prompt and answer together.", least=2)
    max_num_seqs: int = option(8, "Requests computed at the same time.", least=1)
    gpu_memory_utilization: float = option(
        0.9, "Share of the memory the server may take.", above=0, most=1
    )
    block_size: int = option(64, "Tokens of a block of the key/value cache.", least=1)


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `erniekit export` and `erniekit split` write."""

    export_format: str | None = option(
        None,
        "A model folder in one of the layouts, a GGUF file for llama.cpp, or the adapter alone for "
        "PEFT; none: the base with the adapter merged into it, in the layout of the base.",
        choices=(None, "pt", "paddle", "transformers", "gguf", "peft"),
    )
    gguf_dtype: str = option(
        "f16", "Type of the weights in a GGUF file.", choices=("f32", "f16", "bf16", "q8_0", "q4_0")
    )
    copy_tokenizer: bool = option(True, "Put the tokenizer beside the weights.")
    max_shard_size: float = option(5.0, "Largest weight file, in GB.", above=0)


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """What a run tells: where its numbers go, answers to evaluation prompts, public benchmarks."""

    report_to: tuple[str, ...] = option(
        (),
        "Where numbers go besides metrics.jsonl and report.html: tensorboard, visualdl, wandb, "
        "swanlab (the last two write to disk unless WANDB_MODE or SWANLAB_MODE says otherwise); "
        "all: those that are installed; comma list.",
    )
    logging_dir: str | None = option(
        None, "Folder of what report_to writes; none: output_dir/logs.", path=True
    )
    disable_tqdm: bool = option(
        False, "Print a line a step on a terminal too, where there is a progress bar otherwise."
    )
    num_answers: int = option(
        3,
        "Evaluation prompts, spread over the data, that the model answers; -1: all, 0: none.",
        least=-1,
    )
    max_answer_tokens: int = option(64, "Most tokens of such an answer.", least=1)
    answer_steps: int | None = option(
        None,
        "Steps between answers while training; none: where the run evaluates, before the first "
        "and after the last step.",
        least=1,
    )
    lm_eval_tasks: tuple[str, ...] = option(
        (), "Tasks of lm-eval that `erniekit eval` runs; comma list."
    )
    lm_eval_task_path: str | None = option(
        None,
        "Folder of task files, which takes the place of lm-eval's own tasks; what the files name "
        "(data, Python functions) is used.",
        path=True,
    )
    lm_eval_num_fewshot: int | None = option(
        None, "Examples before a question; none: the task's.", least=0
    )
    lm_eval_limit: int | None = option(None, "Questions of each task; none: all.", least=1)


SINKS = ("tensorboard", "visualdl", "wandb", "swanlab", "all", "none")
