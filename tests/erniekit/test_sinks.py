"""Other homes of a run's numbers: TensorBoard read back, the others as their packages see them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ernie.settings import ConfigError
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.report import sinks
from tests.erniekit.test_report import lines, words


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Value by step by tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_numbers_of_the_records(tiny, data: Path, tmp_path: Path) -> None:
    more = {"report_to": "tensorboard", "num_answers": 0, "logging_dir": tmp_path / "logs"}
    assert main(["train", *words(tiny("tiny-dense"), data, tmp_path / "out", **more)]) == 0
    shown = scalars(tmp_path / "logs/tensorboard")
    for tag, key in (
        ("train/loss", "loss"), ("train/lr", "learning_rate"), ("eval/loss", "eval_loss"),
        ("eval/accuracy", "eval_accuracy"), ("train/grad_norm", "grad_norm"),
    ):  # fmt: skip
        wanted = {r["step"]: r[key] for r in lines(tmp_path / "out/metrics.jsonl") if key in r}
        assert shown[tag] == pytest.approx(wanted, rel=1e-6), tag


def test_tensorboard_of_a_resumed_run_forgets_the_lost_steps(
    tiny, data: Path, tmp_path: Path
) -> None:
    more = {"report_to": "tensorboard", "num_answers": 0}
    arguments = words(tiny("tiny-dense"), data, tmp_path, **more)
    assert main(["train", *arguments]) == 0
    (tmp_path / "checkpoint-6/complete.json").unlink()
    assert main(["train", *arguments, "max_steps=4", "eval_steps=2"]) == 0
    shown = scalars(tmp_path / "logs/tensorboard")["train/loss"]
    wanted = {r["step"]: r["loss"] for r in lines(tmp_path / "metrics.jsonl") if "loss" in r}
    assert list(shown) == [1, 2, 3, 4]
    assert shown == pytest.approx(wanted, rel=1e-6)


class Recorded:
    """Stands in for a package: remembers each call by its name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call


RECORD = {"step": 3, "loss": 1.5, "learning_rate": 0.1, "eval_ppl": 4.0, "skipped": True,
          "grad_norm": float("nan")}  # fmt: skip
NUMBERS = {"train/loss": 1.5, "train/lr": 0.1, "eval/ppl": 4.0}


@pytest.mark.parametrize("name", ["visualdl", "wandb", "swanlab"])
def test_packages_get_the_numbers_and_send_nothing(name, tmp_path: Path, monkeypatch) -> None:
    package = Recorded()
    monkeypatch.setitem(sys.modules, name, package)
    for variable in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    run = run_from({"report_to": name, "output_dir": str(tmp_path / "run-7")})
    (sink,) = sinks.open_sinks(run, 0)
    sink.write(3, sinks.numbers_of(RECORD))
    sink.close()
    (first, _, options), *written, (last, *_) = package.calls
    folder = str(tmp_path / "run-7/logs" / name)
    assert Path(folder).is_dir()
    if name == "visualdl":
        assert (first, options, last) == ("LogWriter", {"logdir": folder}, "close")
        values = {call["tag"]: call["value"] for _, _, call in written}
        assert {call["step"] for _, _, call in written} == {3}
    else:
        assert (first, last) == ("init", "finish")
        assert options["mode"] == "offline" and folder in options.values()
        assert options["config"]["learning_rate"] == 5e-5
        ((_, (values,), at),) = written
        assert at == {"step": 3}
    assert values == NUMBERS


def test_mode_of_the_environment_is_kept(tmp_path: Path, monkeypatch) -> None:
    package = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_MODE", "online")
    sinks.open_sinks(run_from({"report_to": "wandb", "output_dir": str(tmp_path)}), 0)
    assert package.calls[0][2]["mode"] == "online"


@pytest.mark.parametrize("name", ["tensorboard", "visualdl", "wandb", "swanlab"])
def test_missing_package_is_named_before_anything_is_trained(
    name, tiny, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    arguments = words(tiny("tiny-dense"), data, tmp_path, report_to=name)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"pip install {name}" in error and error.count("\n") == 1
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = run_from({"report_to": "tensorboard", "logging_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match=r"Not a directory\); give another logging_dir"):
        sinks.open_sinks(run, 0)


def test_all_means_those_that_are_installed(tmp_path: Path, monkeypatch) -> None:
    found = {"wandb", "swanlab"}
    spec = lambda name: SimpleNamespace() if name in found else None  # noqa: E731
    monkeypatch.setattr(sinks.importlib.util, "find_spec", spec)
    for name in found:
        monkeypatch.setitem(sys.modules, name, Recorded())
    made = sinks.open_sinks(run_from({"report_to": "all", "output_dir": str(tmp_path)}), 0)
    assert [type(sink).__name__ for sink in made] == ["WandB", "SwanLab"]


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="report_to='tensorbord' is not known; use tensorboard"):
        run_from({"report_to": "tensorbord"})
    assert sinks.open_sinks(run_from({"report_to": "none"}), 0) == []
