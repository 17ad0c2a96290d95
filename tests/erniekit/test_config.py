"""Settings: ERNIEKit's keys, mistakes and their messages, the examples, the command line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ernie
from ernie.models import MODELS
from ernie.settings import ConfigError, read_yaml
from erniekit import config, foreign
from erniekit.build import config_of
from erniekit.cli import VERBS, main
from erniekit.config import Optimisation, read_run, resolved, run_from, to_yaml
from erniekit.optim import learning_rate_at, treatments

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/configs").rglob("*.yaml"))
OWN = [f.name for kind in config.GROUPS for f in dataclasses.fields(kind)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_parse_and_their_model_builds(path: Path) -> None:
    run = read_run([str(path)])
    name = run.model.model_name_or_path
    if name == "SmolLM2-135M":  # made by the user with import-gguf
        return
    model = ernie.ErnieModel(config_of(name), device="meta")
    expected = MODELS["ERNIE-4.5-0.3B"].config.num_params()
    assert sum(p.numel() for p in model.parameters()) == expected


def test_example_keys_are_read_as_they_are_meant() -> None:
    run = read_run([str(ROOT / "examples/configs/ERNIE-4.5-0.3B/sft/run_sft_lora_8k.yaml")])
    assert run.is_lora and run.model.lora_rank == 32
    assert run.data.max_seq_len == 8192 and run.data.train_dataset_prob == (1.0,)
    assert run.optimisation.learning_rate == 1e-4 and run.optimisation.adam_beta2 == 0.95
    assert "tensorwise_offload_optimizer" in run.without_effect
    assert resolved(run, "cpu").model.lora_alpha == 64


def test_tables_of_keys_do_not_overlap() -> None:
    names = [*OWN, *foreign.WITHOUT_EFFECT, *foreign.NEUTRAL]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=1"], "did you mean 'learning_rate'"),
        (["tensor_parallel_degree=2"], "tensor_parallel_degree=2 is not available yet"),
        (["compute_type=wint4/8"], "compute_type=wint4/8 is not available yet; use bf16"),
        (["stage=DPO"], "stage=DPO is not available yet; use SFT"),
        (["fine_tuning=lora"], "use one of LoRA, Full"),
        (["lora=false", "fine_tuning=LoRA"], "contradicts"),
        (["max_steps=0"], "max_steps=0"),
        (["batch_size=0"], "give 1 or more"),
        (["train_dataset_path=a,b"], "have 1, 2 and 1 entries"),
        (["train_dataset_type=csv"], "use erniekit, alpaca or messages"),
        (["min_lr=1"], "above learning_rate"),
        (["lr_scheduler_type=cosin"], "use one of linear"),
        (["learning_rate=fast"], "takes float"),
        (["nonsense"], "is not a .yaml"),
        (["--seed"], "has no value"),
        (["there_is_none.yaml"], "there is no file"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(words, message, capsys) -> None:
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_and_words_mean_the_same() -> None:
    words = ["learning_rate=1e-3", "fine_tuning=Full", "max_steps=3"]
    flags = ["--learning_rate", "1e-3", "--fine_tuning=Full", "--max_steps", "3"]
    assert read_run(words) == read_run(flags)


def test_run_yaml_repeats_the_run(tmp_path: Path) -> None:
    words = [
        "evaluation_strategy=no",
        "train_dataset_path=a,b",
        "train_dataset_type=alpaca,messages",
        "train_dataset_prob=1,2",
        "no_recompute_layers=0,5",
        "rslora_plus=true",
    ]
    run = resolved(read_run(words), "cpu")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))
    assert read_run([str(path)]) == run
    assert resolved(run, "cpu") == run
    assert read_yaml(path)["lora_alpha"] == 4.0


def test_lean_precision_is_only_chosen_for_full_training_on_a_cpu() -> None:
    for fine_tuning, device, lean in (("Full", "cpu", True), ("Full", "cuda", False),
                                      ("LoRA", "cpu", False)):  # fmt: skip
        o = resolved(run_from({"fine_tuning": fine_tuning}), device).optimisation
        assert (o.use_lowprecision_moment, o.amp_master_grad) == (lean, not lean)
    o = resolved(run_from({"fine_tuning": "Full", "amp_master_grad": True}), "cpu").optimisation
    assert o.amp_master_grad and o.use_lowprecision_moment


@pytest.mark.parametrize("verb", [v for v in VERBS if VERBS[v].function])
def test_help_of_every_verb_names_its_settings(verb: str, capsys) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for group in VERBS[verb].groups:
        for f in dataclasses.fields(group):
            assert f"  {f.name}:" in text and f.metadata["help"] in text


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from erniekit.cli import main; main(['train', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_commands_are_refused_with_a_suggestion(capsys) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


# --- schedules and groups ---


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ({"lr_scheduler_type": "linear"}, {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ({"lr_scheduler_type": "cosine", "min_lr": 0.1}, {5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ({"lr_scheduler_type": "cosine"}, {10: 1, 40: 0.75, 70: 0.25}),
        ({"lr_scheduler_type": "constant"}, {0: 1, 5: 1, 99: 1}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {0: 0, 5: 0.5, 99: 1}),
        ({"lr_scheduler_type": "polynomial", "power": 2, "lr_end": 0}, {10: 1, 55: 0.25, 100: 0}),
        ({"lr_scheduler_type": "wsd:50", "min_lr": 0.2}, {5: 0.5, 10: 1, 60: 1, 100: 0.2}),
        ({"lr_scheduler_type": "wsd:50", "decay_function": "1-sqrt"}, {60: 1, 70: 0.5, 100: 0}),
        ({"lr_scheduler_type": "wsd"}, {50: 1, 90: 1, 100: 0}),
        ({"lr_scheduler_type": "linear", "decay_steps": 60}, {35: 0.5, 60: 0, 99: 0}),
    ],
)
def test_schedules_by_their_formula(values: dict, points: dict) -> None:
    o = Optimisation(learning_rate=1.0, warmup_steps=10, **values)
    for step, expected in points.items():
        got = learning_rate_at(step, 100, o)
        assert got == pytest.approx(expected, abs=1e-9), f"step {step}: {got}"


def test_treatments_know_vectors_layers_routers_and_lora() -> None:
    sizes = {
        "model.embed_tokens.weight": (4, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.1.mlp.gate.weight": (4, 4),
        "model.layers.1.self_attn.q_proj.lora_B": (4, 4),
        "lm_head.weight": (4, 4),
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    o = Optimisation(weight_decay=0.1, layerwise_lr_decay_bound=0.4, moe_gate_lr_ratio=0.5)
    found = treatments(parameters, o, num_layers=2, lora_plus_scale=4.0)
    assert [t.weight_decay for t in found.values()] == [0.1, 0.0, 0.1, 0.1, 0.1]
    expected = [0.4, 0.6, 0.5 * 0.8, 4 * 0.8, 1.0]
    assert [t.factor for t in found.values()] == pytest.approx(expected)


def test_several_processes_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("NNODES", "2")
    assert main(["train", "model_name_or_path=x"]) == 2
    assert "NNODES=2 asks for several processes" in capsys.readouterr().err


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'ERNIE-4\.5-0\.3B'"):
        config_of("baidu/ERNIE-4.5-0.3-Paddle")
