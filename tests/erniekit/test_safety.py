"""Steps that must not be taken, what is left for the bug hunt, memory that runs out, averages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ernie
from erniekit import checkpoint, losses
from erniekit.cli import main
from erniekit.config import Training, run_from
from erniekit.loop import Progress, _why_skip
from erniekit.plan import plan
from tests.erniekit.test_resume import ROOT, curve, words


@pytest.fixture
def spoil(monkeypatch):
    """A function that multiplies the loss of the given calls (1, 2, ..) by a factor."""

    def do(calls: Callable[[int], bool], factor: float) -> None:
        real, count = losses.next_token, [0]

        def spoilt(*arguments, **options):
            loss = real(*arguments, **options)
            count[0] += 1
            if calls(count[0]):
                loss.total = loss.total * factor
            return loss

        monkeypatch.setattr(losses, "next_token", spoilt)

    return do


def plain(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    values = {"evaluation_strategy": "no", "gradient_accumulation_steps": 1, "save_steps": 100}
    return words(model, data, output, **(values | more))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_spike_is_skipped_and_leaves_weights_and_moments_as_they_were(
    spoil, tiny, data: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0}
    spoil(lambda call: call == 13, 1e4)
    assert main(plain(tiny("tiny-dense"), data, tmp_path, max_grad_spike=20, **more)) == 0
    assert [r["step"] for r in records(tmp_path) if r.get("skipped")] == [13]
    assert "times the usual one" in records(tmp_path)[12]["skipped_because"]
    for part in ("adapter_model.safetensors", "optimizer/adamw.safetensors"):
        before, after, later = (
            load_file(tmp_path / f"checkpoint-{n}" / part) for n in (12, 13, 14)
        )
        assert all(torch.equal(before[k], after[k]) for k in before), part
        assert not all(torch.equal(after[k], later[k]) for k in before), part


def test_what_is_usual_is_the_median_of_a_window() -> None:
    training = Training(max_grad_spike=3.0, grad_spike_window=12)
    progress = Progress()
    assert not any(_why_skip(1.0, norm, training, progress) for norm in [100.0] + [1.0] * 9)
    assert "3.1 times" in _why_skip(1.0, 3.1, training, progress)
    assert not _why_skip(1.0, 2.9, training, progress)
    assert "not finite" in _why_skip(1.0, float("inf"), training, progress)
    assert progress.norms == [100.0, *[1.0] * 9, 3.1, 2.9]
    for _ in range(12):  # what lasts becomes usual
        _why_skip(1.0, 50.0, training, progress)
    assert not _why_skip(1.0, 50.0, training, progress)
    assert progress.norms == [50.0] * 12
    assert not _why_skip(1.0, 1e9, Training(), Progress())


def test_spikes_after_a_resume_are_judged_as_without(
    spoil, tiny, data: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 14, "max_grad_spike": 20, "max_grad_norm": 0}
    spoil(lambda call: call in (13, 27), 1e4)  # step 13 of both
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(plain(tiny("tiny-dense"), data, whole, **more)) == 0
    assert main(plain(tiny("tiny-dense"), data, parts, stop_after_step=11, **more)) == 0
    assert main(plain(tiny("tiny-dense"), data, parts, **more)) == 0
    assert curve(parts) == curve(whole)
    assert [r["step"] for r in records(parts) if r.get("skipped")] == [13]


def test_beyond_the_budget_a_bundle_tells_what_the_step_saw(
    spoil, tiny, data: Path, tmp_path: Path, capsys
) -> None:
    spoil(lambda call: call >= 3, float("nan"))
    more = {"max_skipped_steps": 1, "save_steps": 1}
    assert main(plain(tiny("tiny-dense"), data, tmp_path, **more)) == 2
    assert f"what led to it is in {tmp_path}/debug-4" in capsys.readouterr().err
    bundle = tmp_path / "debug-4"
    facts = json.loads((bundle / "step.json").read_text())
    assert facts["step"] == 4 and facts["reason"] == "its loss or gradient is not finite"
    assert set(facts["norm_by_parameter"].values()) == {"nan"}
    assert len(facts["rng"]) == torch.get_rng_state().numel()
    lines = (data / "train.jsonl").read_text().splitlines()
    tokenizer = ernie.tokenizer.Tokenizer.from_folder(tiny("tiny-dense"))
    rows = [json.loads(line) for line in (bundle / "batches.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        path, _, number = row["file"].rpartition(":")
        assert path == str(data / "train.jsonl")
        question = json.loads(lines[int(number) - 1])["src"][0]
        assert question in tokenizer.decode(row["token_ids"]), row["file"]
        assert 0 < len(row["trained"]) < len(row["token_ids"])
    told = [
        json.loads(line)["step"] for line in (bundle / "records.jsonl").read_text().splitlines()
    ]
    assert told == [1, 2, 3, 4]
    assert "max_skipped_steps: 1" in (bundle / "run.yaml").read_text()
    before, after = (
        load_file(tmp_path / f"checkpoint-{n}/adapter_model.safetensors") for n in (2, 4)
    )
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_what_was_saved_before_skipped_steps_stays_and_is_the_way_back(
    spoil, tiny, data: Path, tmp_path: Path, capsys
) -> None:
    spoil(lambda call: 4 <= call <= 8, float("nan"))
    more = {"max_skipped_steps": 4, "save_steps": 1, "save_total_limit": 2, "max_steps": 10}
    assert main(plain(tiny("tiny-dense"), data, tmp_path, **more)) == 2
    before = tmp_path / "checkpoint-3"
    told = capsys.readouterr().err
    assert f"resume_from_checkpoint={before}, or an earlier one" in told
    assert "data position" not in told
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 3, 7, 8]
    more |= {"resume_from_checkpoint": before, "learning_rate": 1e-3}
    assert main(plain(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [9, 10]
    assert not any(record.get("skipped") for record in records(tmp_path))


def test_steps_that_are_skipped_from_the_first_on_have_no_way_back(
    spoil, tiny, data: Path, tmp_path: Path, capsys
) -> None:
    spoil(lambda call: True, float("nan"))
    more = {"max_skipped_steps": 1, "save_steps": 1}
    assert main(plain(tiny("tiny-dense"), data, tmp_path, **more)) == 2
    assert "no checkpoint is from before it: overwrite_output_dir=true" in capsys.readouterr().err


OUT_OF_MEMORY = """
import resource, sys
import erniekit.recipes.sft
from erniekit import loop
from erniekit.cli import main
real = loop._backward
def limited(parts, window, step, scale):
    if window[0].cursor.num_records > {records}:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        import torch
        torch.zeros(1 << 28)
    return real(parts, window, step, scale)
loop._backward = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_running_out_of_memory_is_one_sentence_with_what_takes_less(
    tiny, data: Path, tmp_path: Path
) -> None:
    arguments = plain(
        tiny("tiny-dense"), data, tmp_path, save_steps=1, max_seq_len=1024, buffer_size=1,
        greedy_intokens="false", max_steps=6, fine_tuning="Full", dataloader_num_workers=0,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY.format(records=40), *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "out of memory" in last and "planned are" in last and "checkpoint-" in last, last
    assert "less takes: " in last or "no two settings" in last, last


def test_averages_are_those_of_the_weights_after_each_step(
    tiny, data: Path, tmp_path: Path
) -> None:
    for name, kind, file in (
        ("tiny-dense", "LoRA", "adapter_model.safetensors"),
        ("tiny-moe", "Full", "model.safetensors"),
    ):
        more = {"max_steps": 4, "save_steps": 1, "fine_tuning": kind}
        output = tmp_path / kind
        # Stopped in the middle: the average is resumed as well.
        for last in (2, 4):
            arguments = plain(
                tiny(name), data, output, ema_decay=0.75, stop_after_step=last, **more
            )
            assert main(arguments) == 0
        assert main(plain(tiny(name), data, output, ema_decay=0.75, **more)) == 0
        steps = [load_file(output / f"checkpoint-{n}" / file) for n in (1, 2, 3, 4)]
        averages = [load_file(output / f"checkpoint-{n}/ema" / file) for n in (1, 2, 3, 4)]
        assert any(not torch.equal(steps[3][k], averages[3][k]) for k in steps[3])
        for before, weights, after in zip(averages, steps[1:], averages[1:]):
            for key, average in after.items():
                if key.endswith("e_score_correction_bias"):  # moved, not trained
                    assert torch.equal(average, weights[key])
                    continue
                expected = before[key] * 0.75 + weights[key] * 0.25
                torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
        final = load_file(output / "ema" / file)
        for key, average in averages[3].items():
            assert torch.equal(final[key], average.to(final[key].dtype)), key


def test_averaging_changes_nothing_of_the_training(tiny, data: Path, tmp_path: Path) -> None:
    for name, decay in (("with", 0.9), ("without", 0.0)):
        arguments = plain(tiny("tiny-dense"), data, tmp_path / name, max_steps=3, ema_decay=decay)
        assert main(arguments) == 0
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert not (tmp_path / "without/ema").exists()


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_the_plan_knows_the_average_and_the_copy(fine_tuning: str, tiny, data, tmp_path) -> None:
    settings = {"model_name_or_path": str(tiny("tiny-moe")), "fine_tuning": fine_tuning}
    base = plan(run_from(settings), "cpu")
    found = plan(run_from(settings | {"ema_decay": 0.9, "use_async_save": True}), "cpu")
    assert found.parts["average"] == 4 * found.num_trained
    assert found.checkpoint_bytes == base.checkpoint_bytes + 4 * found.num_trained
    assert found.parts["copy"] == found.checkpoint_bytes


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ema_decay": 1}, "ema_decay=1 is too large; give 0 to below 1"),
        ({"max_grad_spike": 0.5}, "would skip every other step"),
        (
            {"max_grad_spike": 5, "optimizer_in_backward": True, "max_grad_norm": 0},
            "give only one of them",
        ),
        ({"stop_after_step": 0}, "stop_after_step=0 is too small"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told) -> None:
    with pytest.raises(ernie.settings.ConfigError, match=told):
        run_from(settings)
