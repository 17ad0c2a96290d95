"""The settings of a run: ERNIEKit's flat YAML keys as frozen dataclasses, one per subject.

A file and `key=value` words become one flat dict; keys that ERNIEKit has but that mean nothing here
are taken out and reported (`erniekit.foreign`); the rest is distributed over the groups by field
name, checked (`validate`), and every "auto" is resolved into a *new* `Run` (`resolved`). The same
fields make `--help`, the documentation tables and `run.yaml`.

Imports no torch: `erniekit --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, fill, read_overrides, read_yaml
from erniekit import foreign
from erniekit.config import effects
from erniekit.config.checks import validate
from erniekit.config.data import Audit, Data, Pictures
from erniekit.config.methods import Policy, Preferences
from erniekit.config.model import AUTO, Model, parts_again
from erniekit.config.services import Export, Generation, Reporting, Server
from erniekit.config.stages import STAGES, Stage
from erniekit.config.training import Optimisation, Parallel, Training

GROUPS = (
    Model, Data, Pictures, Preferences, Policy, Training, Optimisation, Generation, Server, Export,
    Reporting, Parallel, Audit,
)  # fmt: skip
_OWN = {f.name for kind in GROUPS for f in dataclasses.fields(kind)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every setting of a run, as in `run.data.max_seq_len`; see each group's fields."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    pictures: Pictures = field(default_factory=Pictures)
    preferences: Preferences = field(default_factory=Preferences)
    policy: Policy = field(default_factory=Policy)
    training: Training = field(default_factory=Training)
    optimisation: Optimisation = field(default_factory=Optimisation)
    generation: Generation = field(default_factory=Generation)
    server: Server = field(default_factory=Server)
    export: Export = field(default_factory=Export)
    reporting: Reporting = field(default_factory=Reporting)
    parallel: Parallel = field(default_factory=Parallel)
    audit: Audit = field(default_factory=Audit)
    words: tuple[str, ...] = field(default=(), compare=False)  # of the command line
    without_effect: tuple[str, ...] = ()
    chosen_layers: tuple[str, ...] = ()  # as recompute_layers, for granularity auto

    def flat(self) -> dict[str, Any]:
        """All keys and values, in the order of the groups: the content of `run.yaml`."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for group in self.groups
            for key, value in dataclasses.asdict(group).items()
        }

    @property
    def groups(self) -> list[Any]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)][: len(GROUPS)]

    @property
    def is_lora(self) -> bool:
        return self.model.fine_tuning == "LoRA"

    @property
    def bias_step(self) -> float:
        """By how much the routing bias moves after a step."""
        given = self.model.moe_use_aux_free_update_coef
        if self.is_lora:
            return 0.0
        return given if given is not None else 0.001 if self.stage.balances_load else 0.0

    @property
    def adds_to_base(self) -> bool:
        """Whether adapters add to their base, so that the base is the model without them."""
        return self.is_lora and not (self.model.use_dora or self.model.pissa)

    @property
    def is_own_reference(self) -> bool:
        """Whether the model as training found it is the one that is trained, with adapters off."""
        return self.adds_to_base and not self.model.lora_path

    @property
    def generates_apart(self) -> bool:
        """Whether rollouts are drawn from the base in a form of its own, adapters beside it."""
        return self.adds_to_base and self.model.compute_type == "bf16"

    @property
    def chooses_layers(self) -> bool:
        """Whether what is computed again is to be chosen (`erniekit.fit`)."""
        return self.model.recompute and self.model.recompute_granularity == AUTO

    def recomputed(self, part: int | str) -> str | None:
        """What of a layer, by number, or of the `TOWER` is computed again: full, full_attn, mlp or
        None.
        """
        model = self.model
        if not model.recompute or part in model.no_recompute_layers:
            return None
        if words := self.chosen_layers or model.recompute_layers:
            return parts_again(words).get(part)
        everywhere = model.recompute_granularity
        return everywhere if everywhere in ("full", "full_attn", "mlp") else None

    @property
    def stage(self) -> Stage:
        return STAGES[self.model.stage]

    @property
    def output(self) -> Path:
        if self.training.output_dir is None:
            raise ConfigError("output_dir is none; give a folder")
        return Path(self.training.output_dir)

    @property
    def data_paths(self) -> list[str]:
        """Files that records are read from, and what is made in place of a file (reasoning_gym)."""
        files = [*self.data.files("train"), *self.data.files("eval")]
        return [*(path for _, path, _ in files), *self.policy.pair_dataset_path]

    @property
    def way_on(self) -> str:
        """What to start so that the run, once it was ended, goes on from its last checkpoint."""
        if self.training.overwrite_output_dir:
            return f"erniekit resume {shlex.quote(str(self.output))}"
        return "the same command"


def read_run(words: Sequence[str]) -> Run:
    """The run described by `[file.yaml] key=value ...`; `--key value` is understood too.

    Raises ConfigError in one sentence for anything that does not fit.
    """
    return dataclasses.replace(run_from(*read_values(words)), words=tuple(words))


def read_values(words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The flat, unchecked values of such words, and where they come from.

    Raises ConfigError for an unknown key among the words themselves.
    """
    words = list(words)
    values: dict[str, Any] = {}
    origin = "the command line"
    if words and "=" not in words[0] and not words[0].startswith("-"):
        origin = words.pop(0)
        if Path(origin).suffix not in (".yaml", ".yml", ".json"):
            raise ConfigError(f"{origin!r} is not a .yaml, .yml or .json file of settings")
        values = read_yaml(origin)
    given = read_overrides(_undashed(words))
    foreign.refuse_unknown(given, _OWN, "the command line")
    # Each under the names of here, so that a word stands above the file whatever it is called.
    of_file = {key: value for key, value in values.items() if key not in given}
    return foreign.renamed(of_file) | foreign.renamed(given), origin


def run_from(values: Mapping[str, Any], origin: str = "the settings") -> Run:
    """A checked `Run` from a flat mapping of ERNIEKit's keys."""
    values = {key: _respelt(key, value) for key, value in values.items()}
    values = foreign.renamed(values)
    kept, without_effect = foreign.separate(values, _OWN, origin)
    lora = kept.get("lora")
    groups = fill(GROUPS, kept, origin)
    if groups[0].lora is not None:
        groups[0] = _from_lora_key(groups[0], given="fine_tuning" in kept, lora=lora)
    names = [f.name for f in dataclasses.fields(Run)][: len(GROUPS)]
    run = Run(**dict(zip(names, groups)))
    without_effect += effects.without_effect(run, changed(run))
    run = dataclasses.replace(run, without_effect=tuple(without_effect))
    validate(run)
    return run


def _respelt(key: str, value: Any) -> Any:
    """ERNIEKit's empty strings mean "not given"; YAML reads the strategy `no` as false."""
    if key.endswith("_strategy") and value is False:
        return "no"
    if key == "token_balance_loss" and str(value).lower() in ("true", "false"):
        return "budget" if str(value).lower() == "true" else "none"
    if key == "modality_ratio" and isinstance(value, str):
        return value.strip().strip("[]")
    if key == "freeze_config" and isinstance(value, str):
        return value.replace(",", " ").split()
    return None if isinstance(value, str) and not value.strip() else value


def _from_lora_key(model: Model, *, given: bool, lora: Any) -> Model:
    wanted = "LoRA" if model.lora else "Full"
    if given and model.fine_tuning != wanted:
        raise ConfigError(
            f"lora={lora} contradicts fine_tuning={model.fine_tuning}; give only fine_tuning"
        )
    return dataclasses.replace(model, fine_tuning=wanted, lora=None)


def _undashed(words: list[str]) -> list[str]:
    """`--key value` and `--key=value` as `key=value`."""
    result, rest = [], iter(words)
    for word in rest:
        if not word.startswith("--") or "=" in word:
            result.append(word.removeprefix("--"))
            continue
        value = next(rest, None)
        if value is None:
            raise ConfigError(f"{word} has no value; write {word.removeprefix('--')}=value")
        result.append(f"{word.removeprefix('--')}={value}")
    return result


def resolved(run: Run, device: str) -> Run:
    """A new `Run` in which nothing is left to be decided, for a run on `device` (cpu or cuda)."""
    model, training, optimisation = run.model, run.training, run.optimisation
    # What LoRA alone reads stays as it was given: a resumed run names what has no effect.
    if model.rslora_plus and run.is_lora:
        model = dataclasses.replace(
            model, rslora_plus=False, rslora=True, lora_plus_scale=4.0, lora_alpha=4.0
        )
    if model.lora_alpha == -1 and run.is_lora:
        alpha = 4.0 if model.rslora else 2.0 * model.lora_rank
        model = dataclasses.replace(model, lora_alpha=alpha)
    if model.loss_subbatch_seqlen == -1:
        # A GPU wants products as large as it can get; a CPU keeps the logits in its cache.
        chunk = 4096 if device == "cuda" else 128
        model = dataclasses.replace(model, loss_subbatch_seqlen=chunk)
    strategy = training.evaluation_strategy
    lean = not run.is_lora and device == "cpu"
    if optimisation.amp_master_grad is None:
        optimisation = dataclasses.replace(optimisation, amp_master_grad=not lean)
    if optimisation.use_lowprecision_moment is None:
        optimisation = dataclasses.replace(optimisation, use_lowprecision_moment=lean)
    training = dataclasses.replace(
        training,
        device="gpu" if device == "cuda" else "cpu",
        eval_steps=training.eval_steps or (500 if strategy == "steps" else None),
    )
    return dataclasses.replace(run, model=model, training=training, optimisation=optimisation)


def changed(run: Run) -> dict[str, Any]:
    """The keys whose value is not the default."""
    defaults = Run().flat()
    return {key: value for key, value in run.flat().items() if value != defaults[key]}


def to_yaml(run: Run) -> str:
    import yaml

    return yaml.safe_dump(run.flat(), sort_keys=False, allow_unicode=True)
