"""The command `erniekit`: a table of verbs, one line of code each.

    erniekit train run_sft.yaml learning_rate=1e-4 max_steps=20

A verb is a function path, the settings it reads, and a sentence; `--help` is made from the fields
of those settings. Nothing heavy is imported before a verb runs. What a user can cause ends in one
sentence on stderr and exit status 2.
"""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass

from ernie.settings import ConfigError, describe, did_you_mean
from erniekit import config
from erniekit.config import (
    Audit,
    Data,
    Export,
    Generation,
    Model,
    Optimisation,
    Parallel,
    Pictures,
    Policy,
    Preferences,
    Reporting,
    Server,
    Training,
)
from erniekit.report import about

TRAINING = (
    Model, Data, Pictures, Preferences, Policy, Training, Optimisation, Parallel, Reporting,
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """`function` is "module:name" of a function of a `Run` or, for verbs with `usage`, of the
    words that follow; `groups` are the settings its help shows. One that `needs_words` means
    nothing without any.
    """

    function: str
    groups: tuple[type, ...]
    help: str
    usage: str = ""
    needs_words: bool = True


VERBS = {
    "train": Verb(
        "erniekit.launch:run_training",
        TRAINING,
        "Train a model; started again, it goes on where it was (not with overwrite_output_dir). "
        "SIGTERM and Ctrl-C finish the step and save first (exit status 0 and 130); a file SAVE in "
        "output_dir asks for a checkpoint after the step.",
    ),
    "resume": Verb(
        "erniekit.resume:run_resume",
        (),
        "Go on with the run of an output folder, by its run.yaml. With --verify: repeat the steps "
        "after its newest checkpoint (or the one given) that were recorded, compare every number "
        "and every bit, and write a certificate beside the checkpoint; exit status 1 if anything "
        "differs.",
        "OUTPUT_DIR [KEY=VALUE ...] | --verify OUTPUT_DIR [steps=K] [checkpoint=FOLDER]",
    ),
    "data": Verb(
        "erniekit.data.audit:run_data",
        (Model, Data, Pictures, Training, Audit),
        "Go through the data of a run: every unusable line with its place and reason, where each "
        "token goes, and what evaluation shares with training; exit status 2 above "
        "max_bad_data_share.",
    ),
    "plan": Verb(
        "erniekit.plan_report:run_plan",
        (),
        "Memory, time and disk of a training run, and what makes it fit, from its settings alone; "
        "no weights are read.",
        "[FILE.yaml] [KEY=VALUE ...] [plan_memory_gib=N] [--json]",
    ),
    "export": Verb(
        "erniekit.export:export",
        (Model, Training, Export),
        "Turn what training left in output_dir into files for others, in output_dir/export; a LoRA "
        "checkpoint is merged into its base.",
    ),
    "split": Verb(
        "erniekit.export:split",
        (Training, Export),
        "Write the model of output_dir in files of max_shard_size, into output_dir/split_export.",
    ),
    "merge": Verb(
        "erniekit.merge:run_merge",
        (),
        "Mix models of one shape into a new one, tensor by tensor; sources and target are folders.",
        "SOURCE SOURCE [...] FOLDER [method=linear|slerp|ties|dare|dare_ties] [weights=0.5,0.5] "
        "[base=FOLDER] [density=0.5] [scale=1] [t=0.5] [normalize=true|false] [seed=0] "
        "[layout=pt|paddle|transformers] [dtype=bfloat16|float16|float32] [overwrite=false]",
    ),
    "eval": Verb(
        "erniekit.recipes.evaluation:evaluate_run",
        (Model, Data, Pictures, Preferences, Policy, Training, Reporting),
        "Loss, perplexity, accuracy and answers on the evaluation data, and tasks of lm-eval; "
        "writes eval_results.json and eval_samples.jsonl.",
    ),
    "report": Verb(
        "erniekit.report.story:run_report",
        (),
        "Write report.html of a run anew from the files in its output folder.",
        "OUTPUT_DIR",
    ),
    "server": Verb(
        "erniekit.serve:run_server",
        (Model, Training, Server),
        "Serve what training left in output_dir (what was exported, else the final model, else the "
        "newest checkpoint), or model_name_or_path, over the OpenAI API.",
    ),
    "chat": Verb(
        "erniekit.serve:run_chat",
        (Server, Generation),
        "Talk in the terminal to a running server; `clear` forgets, `exit` ends.",
        needs_words=False,
    ),
    "import-gguf": Verb(
        "erniekit.convert:run_import_gguf",
        (),
        "Turn a GGUF file of a Llama-shaped network into a model folder.",
        "model.gguf FOLDER [layout=pt] [dtype=bfloat16] [overwrite=false]",
    ),
    "export-gguf": Verb(
        "erniekit.convert:run_export_gguf",
        (),
        "Turn a model folder into a GGUF file, which llama.cpp loads; dense and MoE.",
        "MODEL FILE.gguf [dtype=f16|bf16|f32|q8_0|q4_0] [overwrite=false]",
    ),
    "quantize": Verb(
        "erniekit.convert:run_quantize",
        (),
        "Write a model with weights of 8 or 4 bits, ready to serve.",
        "FOLDER QUANTISED_FOLDER [quantization=wint8|wint4|wint4_all] [overwrite=false]",
    ),
    "upcycle": Verb(
        "erniekit.convert:run_upcycle",
        (),
        "Turn a dense model into a mixture of experts that computes the same at first.",
        "DENSE_FOLDER FOLDER [num_experts=8] [top_k=2] [num_shared_experts=2] "
        "[first_moe_layer=1] [seed=0] [layout=pt] [overwrite=false]",
    ),
    "version": Verb("", (), "Print the version."),
    "help": Verb("", (), "Print this text."),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an answer that is no, 2 for a mistake of the
    user, 3 when memory or disk ran out, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else "help"
    if name in ("help", "-h", "--help"):
        print(usage())
        return 0
    if name in ("version", "--version"):
        print(f"erniekit {about.version()}")
        return 0
    if name not in VERBS:
        print(usage(), file=sys.stderr)
        near = did_you_mean(name, VERBS)
        print(f"\nerniekit: there is no command {name!r}{near}", file=sys.stderr)
        return 2
    verb = VERBS[name]
    if {"-h", "--help"} & set(words):
        print(help_of(name))
        return 0
    _log_to_stdout()
    try:
        return _called(verb, words)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _told(name, error)
    except OSError as error:
        from erniekit.faults import of_system

        if (told := of_system(error)) is None:
            raise
        return _told(name, told)
    except KeyboardInterrupt:
        print(f"\nerniekit {name}: stopped", file=sys.stderr)
        return 130


def _called(verb: Verb, words: list[str]) -> int:
    module, _, function = verb.function.partition(":")
    if verb.usage:
        return getattr(importlib.import_module(module), function)(words)
    if verb.needs_words and not words:
        raise ConfigError("no settings were given; give a .yaml file, or key=value words")
    run = config.read_run(words)
    return getattr(importlib.import_module(module), function)(run)


def _told(name: str, error: ValueError) -> int:
    print(f"erniekit {name}: {error}", file=sys.stderr)
    return getattr(error, "exit_status", 2)


def _is_ours(error: ValueError) -> bool:
    """Errors that a user can cause are subclasses of ValueError defined in this project."""
    return type(error).__module__.partition(".")[0] in ("ernie", "erniekit")


def usage() -> str:
    rows = "\n".join(f"  {name:<12} {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: erniekit COMMAND [FILE.yaml] [KEY=VALUE ...]\n\n"
        f"{rows}\n\n`erniekit COMMAND --help` lists its settings."
    )


def help_of(name: str) -> str:
    """The help text of a verb: its settings with defaults, from the fields themselves."""
    verb = VERBS[name]
    arguments = verb.usage or "[FILE.yaml] [KEY=VALUE ...]"
    parts = [f"usage: erniekit {name} {arguments}\n\n{verb.help}"]
    for group in verb.groups:
        title = (group.__doc__ or "").strip().splitlines()[0]
        parts.append(f"{group.__name__}: {title}\n{describe(group)}")
    return "\n\n".join(parts)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    for name, level in (("erniekit", logging.INFO), ("ernie", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
