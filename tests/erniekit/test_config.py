"""Settings: ERNIEKit's keys, mistakes and their messages, the examples, the command line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

import ernie
from ernie.models import MODELS
from ernie.settings import ConfigError, check_bounds, field_types, range_of, read_yaml
from erniekit import config, foreign
from erniekit.build import config_of, frozen
from erniekit.cli import VERBS, main
from erniekit.config import Optimisation, effects, read_run, resolved, run_from, to_yaml
from erniekit.config.methods import Policy, Preferences
from erniekit.config.stages import STAGES, TRAINABLE
from erniekit.launch import recipe_of
from erniekit.optim import learning_rate_at, treatments

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/configs").rglob("*.yaml"))
OWN = [f.name for kind in config.GROUPS for f in dataclasses.fields(kind)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_parse_and_their_model_builds(path: Path) -> None:
    run = read_run([str(path)])
    name = run.model.model_name_or_path
    if not name.startswith("baidu/"):  # made by the user, as the file says
        return
    model = ernie.ErnieModel(config_of(name), device="meta")
    released = MODELS[name.removeprefix("baidu/").removesuffix("-Paddle")].config
    assert sum(p.numel() for p in model.parameters()) == released.num_params(mtp=True)


def test_stages_that_cannot_be_trained_say_so(capsys) -> None:
    path = ROOT / "examples/configs/ERNIE-4.5-0.3B/pt/run_pt_8k.yaml"
    assert read_run([str(path)]).model.stage == "PT"
    untrained = sorted(set(STAGES) - set(TRAINABLE))
    assert untrained
    for stage in untrained:
        assert main(["train", str(path), f"stage={stage}"]) == 2
        assert f"stage={stage} is not available yet; use SFT" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINABLE)
def test_rows_of_stages_name_a_recipe_and_keys_that_exist(name: str) -> None:
    stage = STAGES[name]
    recipe = recipe_of(run_from({"stage": name}))
    assert callable(recipe.run) and callable(recipe.method)
    assert stage.settings <= {*field_types(Preferences), *field_types(Policy)}


def test_a_folder_is_no_file_of_settings(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.yaml").mkdir()
    assert main(["train", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml cannot be read (Is a directory); give the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1\nlearning_rat: 1", "unknown key 'learning_rat' in {path}; did you mean"),
        ("seed: 1\nseed: 2", "{path}, line 2, column 1: key 'seed' is given twice"),
        ("a: &x [1]\nb: *x", "{path}, line 2, column 4: YAML aliases are refused"),
        ("seed: !!python/object/apply:os.system [true]", "{path}, line 1, column 7: could not"),
        ("seed:\n\t- 1", "{path}, line 2, column 1: found character"),
        ("seed: [1", "{path}, line 1"),
        ("seed: 2\n1: 2", "{path}, line 2, column 1: 1 is not a key; give a name"),
        ("null: 3", "{path}, line 1, column 1: null is not a key"),
        ("? [a, b]", "{path}, line 1, column 3: a list or map is not a key"),
        ("seed: 1\nstage: a\0b", "{path}, line 2, column 9: the character U+0000 is not allowed"),
        ('output_dir: "a\\0b"', "output_dir='a\\x00b' holds a NUL character; leave it out"),
        ("seed: " + 3000 * "[" + 3000 * "]", "{path} is nested too deeply"),
        ("- seed", "{path} holds a list"),
        ("seed: one", "seed='one' is not a whole number"),
        ("seed: 1.5", "seed=1.5 is not a whole number"),
        ("seed: true", "seed=True is not a whole number"),
        ("max_steps: .inf", "max_steps=inf is not a whole number"),
        ("learning_rate: .nan", "learning_rate=nan is not a number; give one"),
        ("packing: maybe", "packing='maybe' is not true or false"),
        ("max_seq_len: [1, 2]", "max_seq_len=[1, 2] is not a whole number"),
        ("model_name_or_path: {a: 1}", "model_name_or_path={{'a': 1}} is not a text"),
    ],
)
def test_mistakes_in_files_are_one_sentence(text, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert message.format(path=path) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a string to YAML 1.1
        ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 1_000", "max_steps", 1000),
        ("max_steps: 1e3", "max_steps", 1000),
        ("packing: off", "packing", False),  # booleans of YAML 1.1
        ("packing: No", "packing", False),
        ("packing: 0", "packing", False),
        ("packing: 'true'", "packing", True),
        ("save_strategy: no", "save_strategy", "no"),
        ("lora_path:", "lora_path", None),
        ("lora_path: ''", "lora_path", None),
        ("lora_path: ~", "lora_path", None),
        ("\ufeffseed: 7", "seed", 7),
        ("seed: 7\r\nmax_steps: 3\r\n", "seed", 7),
        ("train_dataset_path: a.jsonl", "train_dataset_path", ["a.jsonl"]),
        ("eval_dataset_prob: '1, 2'\neval_dataset_type: []", "eval_dataset_prob", [1.0, 2.0]),
        ("eval_dataset_prob: [1, 2.5]", "eval_dataset_prob", [1.0, 2.5]),
        ("no_recompute_layers: 3", "no_recompute_layers", [3]),
        ("output_dir: ./a/../b", "output_dir", "./a/../b"),
        ('{"seed": 7}', "seed", 7),
    ],
)
def test_yaml_values_are_read_as_they_are_meant(text, key, value, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    found = read_run([str(path)]).flat()[key]
    assert found == value and type(found) is type(value)


def test_relative_paths_are_those_of_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/run.yaml").write_text("output_dir: out")
    monkeypatch.chdir(tmp_path)
    assert read_run(["configs/run.yaml"]).output.resolve() == tmp_path / "out"


def test_the_users_folder_may_be_written_as_in_a_shell(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: ~/out\ntrain_dataset_path: [~/a.jsonl, b~.jsonl]")
    lists = ["train_dataset_type=erniekit,erniekit", "train_dataset_prob=1,1"]
    run = read_run([str(file), *lists, "model_name_or_path=~/m", "answer_pattern=~/x"])
    assert run.output == tmp_path / "out" and run.model.model_name_or_path == f"{tmp_path}/m"
    assert run.data.train_dataset_path == (f"{tmp_path}/a.jsonl", "b~.jsonl")
    assert run.policy.answer_pattern == "~/x"  # no path
    found = run_from({"stage": "PT", "input_dir": "0.4 ~/a 0.6 b"}).data.files("train")
    assert found == [("indexed", f"{tmp_path}/a", 0.4), ("indexed", "b", 0.6)]


def test_every_setting_that_names_a_path_is_one() -> None:
    fields = [f for kind in config.GROUPS for f in dataclasses.fields(kind)]
    named = {f.name for f in fields if re.search(r"(_path|_dir|_checkpoint)$", f.name)}
    paths = {f.name for f in fields if f.metadata["path"]}
    assert named - paths == {"input_dir", "overwrite_output_dir"}  # paths with weights; no path


def test_words_win_over_the_file_and_the_last_word_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nmax_steps: 5")
    run = read_run([str(path), "seed=2", "seed=3"])
    assert (run.training.seed, run.training.max_steps) == (3, 5)


def test_environment_variables_are_no_settings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("OUTPUT", "elsewhere")
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: $OUTPUT/${SEED}")
    run = read_run([str(path)])
    assert run.training.seed == 42 and run.training.output_dir == "$OUTPUT/${SEED}"


def test_example_keys_are_read_as_they_are_meant() -> None:
    run = read_run([str(ROOT / "examples/configs/ERNIE-4.5-0.3B/sft/run_sft_lora_8k.yaml")])
    assert run.is_lora and run.model.lora_rank == 32
    assert run.data.max_seq_len == 8192 and run.data.train_dataset_prob == (1.0,)
    assert run.optimisation.learning_rate == 1e-4 and run.optimisation.adam_beta2 == 0.95
    assert run.optimisation.offload_optim and "release_grads" in run.without_effect
    assert resolved(run, "cpu").model.lora_alpha == 64


def test_keys_of_preferences_are_without_effect_elsewhere() -> None:
    told = run_from({"beta": 0.3, "max_prompt_len": 2048}).without_effect
    assert sorted(told) == ["beta", "max_prompt_len"]
    assert run_from({"beta": 0.3, "stage": "DPO"}).without_effect == ()


@pytest.mark.parametrize(
    ("text", "words", "key", "value"),
    [
        ("packing: true", ["one_sample_in_one_seq=true"], "packing", False),
        ("one_sample_in_one_seq: true", ["packing=true"], "packing", True),
        ("tensorwise_offload_optimizer: true", ["offload_optim=false"], "offload_optim", False),
        ("max_seq_len: 99", ["pad_to_max_seqlen=4096"], "max_seq_len", 4096),
        ("use_async_save: false", ["unified_checkpoint_config=async_save"], "use_async_save", True),
        ("zcc_save_ema_coef: 0.9", ["ema_decay=0.5"], "ema_decay", 0.5),
        (
            "tensorwise_offload_optimizer: true",
            ["tensorwise_offload_optimizer=false"],
            "offload_optim",
            False,
        ),
        ("offload_optim: true", ["tensorwise_offload_optimizer=false"], "offload_optim", False),
        ("one_sample_in_one_seq: true", ["one_sample_in_one_seq=false"], "packing", True),
        ("packing: false", ["one_sample_in_one_seq=false"], "packing", True),
        (
            "use_ortho_loss_callback: true",
            ["use_ortho_loss_callback=false"],
            "moe_orthogonal_update",
            "loss",
        ),
        (
            "unified_checkpoint_config: async_save",
            ["unified_checkpoint_config="],
            "use_async_save",
            False,
        ),
        ("lr_scheduler: ''\nlr_scheduler_type: cosine", [], "lr_scheduler_type", "cosine"),
    ],
)
def test_a_word_stands_above_the_file_by_whatever_name(text, words, key, value, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert read_run([str(tmp_path / "run.yaml"), *words]).flat()[key] == value


def test_the_schedule_has_two_names() -> None:
    given = {"lr_scheduler": "wsd:603000", "decay_function": "1-sqrt", "warmup_steps": 2000}
    run = run_from(given)
    assert run.optimisation.lr_scheduler_type == "wsd:603000" and run.without_effect == ()
    assert run_from({"lr_scheduler": None, "lr_scheduler_type": "cosine"}).without_effect == ()
    with pytest.raises(ConfigError, match="are one setting; give lr_scheduler_type"):
        run_from({"lr_scheduler": "cosine", "lr_scheduler_type": "linear"})


@pytest.mark.parametrize("more", [{"stage": "SFT"}, {"stage": "RM"}, {"reference_free": True},
                                  {"loss_type": "orpo"}])  # fmt: skip
def test_products_of_training_may_differ_where_nothing_else_is_compared(more: dict) -> None:
    assert run_from({"stage": "DPO", "cpu_products": "bfloat16"} | more).model.cpu_products


def test_documents_by_their_ids_are_named_as_in_erniekit() -> None:
    """The fields of its `run_pt_8k_offline_data.yaml` that say what is read."""
    given = {"stage": "PT", "dataset_type": "pretrain", "input_dir": "1.0 a", "split": "998,2"}
    assert run_from(given).data.input_dir == "1.0 a"


def test_what_is_named_instead_of_a_key_is_a_setting() -> None:
    assert foreign.INSTEAD.keys() <= foreign.NEUTRAL.keys()
    for given in foreign.INSTEAD.values():
        run_from(FULL | yaml.safe_load(given))
    head = {"model.embed_tokens.weight", "lm_head.weight"}
    parts = ("self_attn.q_proj", "mlp.gate", "mlp.experts.up_proj", "input_layernorm")
    names = {*head, "model.norm.weight", *(f"model.layers.0.{part}.weight" for part in parts)}

    def trained(key: str) -> set[str]:
        run = run_from(FULL | yaml.safe_load(foreign.INSTEAD[key]))
        return names - frozen(names, run.model.freeze_parameters)

    assert trained("train_emb_only") == head
    assert {name.split(".")[3] for name in trained("train_moe_only")} == {"mlp"}


LORA, FULL = {"fine_tuning": "LoRA"}, {"fine_tuning": "Full"}
EVALUATED = {"evaluation_strategy": "steps", "eval_dataset_path": "x.jsonl"}
UPO = {"stage": "UPO", "train_dataset_path": "x.jsonl"}
# Settings under which the keys after them do nothing; then those under which they do something.
IDLE = [
    (LORA, {"moe_gate_lr_ratio": 0.01, "moe_z_loss_lambda": 1e-3}, FULL),
    (LORA, {"moe_orthogonal_loss_lambda": 1e-3, "moe_aux_loss_lambda": 1e-2}, FULL),
    (LORA, {"moe_use_aux_free_update_coef": 0.01}, FULL),
    (FULL, {"lora_plus_scale": 4, "rslora": True, "lora_rank": 4, "lora_alpha": 1}, LORA),
    (FULL, {"moe_orthogonal_update": "decoupled"}, FULL | {"moe_orthogonal_loss_lambda": 1}),
    (FULL, {"multi_token_pred_lambda": 0.1}, FULL | {"num_nextn_predict_layers": 1}),
    (FULL, {"grad_spike_window": 9}, FULL | {"max_grad_spike": 10}),
    (FULL, {"muon_momentum": 0.9}, FULL | {"optim": "muon"}),
    (FULL, {"recompute_granularity": "mlp", "no_recompute_layers": [1]}, {"recompute": True}),
    (FULL, {"eval_steps": 9, "max_evaluate_steps": 1, "metric_for_best_model": "ppl"}, EVALUATED),
    (EVALUATED | {"evaluation_strategy": "epoch"}, {"eval_steps": 9}, EVALUATED),
    ({"save_strategy": "epoch"}, {"save_steps": 9}, {}),
    ({"max_steps": 3}, {"num_train_epochs": 2}, {}),
    ({"max_steps": 3}, {"num_train_epochs": 2}, {"max_steps": 3, "save_strategy": "epoch"}),
    ({}, {"prefetch_factor": 9}, {"dataloader_num_workers": 1}),
    ({"mix_strategy": "concat"}, {"num_samples_each_epoch": 9, "train_dataset_prob": [2.0]}, {}),
    ({}, {"split": [1.0, 2.0]}, {"stage": "PT", "input_dir": "1 a"}),
    ({"packing": False}, {"greedy_intokens": False}, {}),
    ({}, {"truncate_packing": False}, {"stage": "PT"}),
    ({"lr_scheduler_type": "constant"}, {"warmup_steps": 3, "min_lr": 1e-9, "decay_steps": 9}, {}),
    ({"warmup_steps": 3}, {"warmup_ratio": 0.1}, {}),
    ({}, {"num_cycles": 1}, {"lr_scheduler_type": "cosine"}),
    ({}, {"lr_end": 0, "power": 2}, {"lr_scheduler_type": "polynomial"}),
    ({}, {"decay_function": "1-sqrt"}, {"lr_scheduler_type": "wsd:3"}),
    (UPO, {"reward_model": "folder"}, UPO | {"reward": "model"}),
    (UPO, {"correction_low": 0.9}, UPO | {"rollout_correction": "icepop"}),
    (UPO | {"rollout_correction": "truncated"}, {"correction_low": 0.9},
     UPO | {"rollout_correction": "icepop"}),
    (UPO, {"correction_high": 4}, UPO | {"rollout_correction": "truncated"}),
    (UPO | {"policy_loss": "none"}, {"clip_low": 0.1, "clip_high": 0.3}, UPO),
    (UPO | {"policy_loss": "none"}, {"advantage_std": False, "rollout_correction": "icepop"}, UPO),
    (UPO | {"policy_loss": "none", "kl_coef": 0}, {"loss_aggregation": "sequence"},
     UPO | {"policy_loss": "none"}),
    (UPO | {"dynamic_sampling": False}, {"max_refills": 2, "min_reward_std": 0.1}, UPO),
    (UPO | {"upo_mu": 0}, {"pair_min_gap": 0.5}, UPO),
    (UPO | {"pair_dataset_path": "y.jsonl"}, {"pair_min_gap": 0.5}, UPO),
    ({"stage": "DPO", "loss_type": "or"}, {"beta": 0.3}, {"stage": "DPO", "loss_type": "ipo"}),
    ({"stage": "DPO", "loss_type": "orpo"}, {"beta": 0.3}, {"stage": "KTO"}),
]  # fmt: skip


@pytest.mark.parametrize(("idle", "keys", "busy"), IDLE, ids=lambda values: ",".join(values))
def test_keys_that_the_run_reads_nowhere_are_told(idle: dict, keys: dict, busy: dict) -> None:
    assert set(run_from(idle | keys).without_effect) == {*keys}
    assert run_from(busy | keys).without_effect == ()
    assert run_from(idle).without_effect == ()


def test_evaluations_need_data() -> None:
    with pytest.raises(ConfigError, match="evaluation_strategy=steps has no data to evaluate on"):
        run_from({"evaluation_strategy": "steps", "eval_steps": 1})
    run = run_from({"evaluation_strategy": "steps", "do_eval": False})
    assert run.without_effect == ("evaluation_strategy",)


@pytest.mark.parametrize("given", [FULL, FULL | {"rslora_plus": True}, LORA, {}])
def test_a_resumed_run_names_only_what_was_given(given: dict) -> None:
    run = run_from(given)
    again = run_from(resolved(run, "cpu").flat())
    assert again.without_effect == run.without_effect


def test_a_key_of_routers_that_switches_off_what_is_not_there_is_not_told() -> None:
    assert run_from(LORA | {"moe_use_aux_free_update_coef": 0}).without_effect == ()


def test_every_key_of_the_table_is_a_setting() -> None:
    keys = {key for _, keys in effects.ONLY_WHERE for key in keys} | {*effects.OF_EXPERTS}
    assert keys <= {*OWN}, keys - {*OWN}


def test_names_of_other_trainers_are_told_with_a_setting() -> None:
    assert {*foreign.ELSEWHERE.values()} <= {*OWN}, {*foreign.ELSEWHERE.values()} - {*OWN}


def test_a_key_is_told_with_where_it_was_given(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 1")
    assert main(["train", str(path), "learning_rat=1"]) == 2
    assert "unknown key 'learning_rat' in the command line;" in capsys.readouterr().err
    path.write_text("learning_rat: 1")
    assert main(["train", str(path), "max_steps=1"]) == 2
    assert f"unknown key 'learning_rat' in {path};" in capsys.readouterr().err


def test_tables_of_keys_do_not_overlap() -> None:
    names = [*OWN, *foreign.WITHOUT_EFFECT, *foreign.NEUTRAL, *foreign.RENAMED, *foreign.ELSEWHERE]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=1"], "'learning_rat' in the command line; did you mean 'learning_rate'"),
        (["gradient_checkpointing=1"], "in the command line; it is called 'recompute' here"),
        (["per_device_train_batch_size=1"], "it is called 'batch_size' here"),
        (["num_epochs=1"], "it is called 'num_train_epochs' here"),
        (["optim=ADAMW"], "optim='ADAMW' is not known; use one of adamw, adamw_custom"),
        (["seed=99999999999999999999999"], "is too large; give 0 to 4294967295"),
        (["lora_rank=1000000"], "lora_rank=1000000 is too large; give 1 to 8192"),
        (["tensor_parallel_degree=2"], "tensor_parallel_degree=2 is not available yet"),
        (["moe_use_aux_free=false"], "is not a setting here; give moe_use_aux_free_update_coef: 0"),
        (
            ["train_emb_only=1"],
            "train_emb_only=1 is not a setting here; give freeze_parameters: model",
        ),
        (["train_moe_only=1"], "give freeze_parameters: embeddings,attention"),
        (["compute_type=fp16"], "compute_type='fp16' is not known; use one of bf16, fp8"),
        (["stage=OCR-VL-SFT"], "stage=OCR-VL-SFT is not available yet; use SFT"),
        (["freeze_config=freeze_vit"], "'freeze_vit' is not known; use freeze_vision or freeze_lm"),
        (["modality_ratio=[1]"], "must be two shares, of text and of pictures"),
        (["text_dataset_path=a.jsonl"], "mixed into data with pictures (stage: VL-SFT)"),
        (["stage=VL-SFT", "sharding=stage3"], "sharding=stage3 needs all ranks to use the same"),
        (["visual_ld=-1"], "visual_ld=-1 is too small; give 0 or more"),
        (["stage=DPO", "loss_type=hing"], "use one of sigmoid, hinge, ipo"),
        (
            ["stage=DPO", "cpu_products=bfloat16"],
            "which stage=DPO compares, would be compute",
        ),
        (["stage=UPO", "cpu_products=bfloat16"], "give cpu_products: float32"),
        (["stage=DPO", "beta=0"], "beta=0 is too small; give more than 0"),
        (
            ["stage=DPO", "label_smoothing=0.5"],
            "label_smoothing=0.5 is too large; give 0 to below 0.5",
        ),
        (["stage=DPO", "max_seq_len=15"], "too small for pairs"),
        (
            ["stage=DPO", "split_multi_turn=true"],
            "split_multi_turn=True is not for judged",
        ),
        (["stage=DPO", "padding=true"], "padding=True is not for judged"),
        (["stage=DPO", "sft_loss_ratio=-1"], "sft_loss_ratio=-1 is too small"),
        (["stage=DPO", "ref_model_update_steps=0"], "=0 is too small; give 1 or more, or -1"),
        (["stage=DPO", "ref_model_update_steps=9", "reference_free=1"], "leave one of them out"),
        (["stage=DPO", "ref_model_update_steps=9", "loss_type=simpo"], "loss_type=simpo does with"),
        (["stage=DPO", "label_smoothing=0.1", "loss_type=ipo"], "is not part of loss_type=ipo"),
        (["stage=DPO", "sft_loss_ratio=0.5", "loss_type=orpo"], "contradicts loss_type=orpo"),
        (["stage=KTO", "desirable_weight=-2"], "desirable_weight=-2 is too small"),
        (["stage=KTO", "padding=true"], "padding=True is not for judged answers (stage: KTO)"),
        (["stage=RM", "max_prompt_len=0"], "max_prompt_len=0 is too small"),
        (["fine_tuning=lora"], "use one of LoRA, Full"),
        (["lora=false", "fine_tuning=LoRA"], "contradicts"),
        (["max_steps=0"], "max_steps=0"),
        (["batch_size=0"], "give 1 or more"),
        (["train_dataset_path=a,b"], "have 1, 2 and 1 entries"),
        (["train_dataset_type=csv"], "use erniekit, alpaca, messages, sharegpt or reasoning_gym"),
        (["min_lr=1"], "above learning_rate"),
        (["lr_scheduler_type=cosin"], "use one of linear"),
        (["learning_rate=fast"], "learning_rate='fast' is not a number"),
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


def numeric_options() -> list[str]:
    return [
        f.name
        for kind in config.GROUPS
        for f in dataclasses.fields(kind)
        if {int, float} & {(hint := field_types(kind)[f.name]), *get_args(hint)}
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_numeric_option_takes_what_is_not_finite(value: str) -> None:
    keys = numeric_options()
    assert len(keys) > 80
    for key in keys:
        with pytest.raises(ConfigError, match=f"{key}="):
            run_from({key: value})


@pytest.mark.parametrize("kind", config.GROUPS, ids=lambda kind: kind.__name__)
def test_every_numeric_option_has_a_range_that_its_default_is_in(kind: type) -> None:
    # Of these every finite number means something.
    free = {"simpo_gamma", "reward_weights", "curriculum_shares"}
    check_bounds(kind())
    for f in dataclasses.fields(kind):
        if f.name in numeric_options():
            assert range_of(f) or f.name in free, f.name


@pytest.mark.parametrize(
    "word",
    [
        "max_grad_norm=-1", "adam_beta1=1", "adam_beta2=1.5", "train_dataset_prob=inf",
        "adam_epsilon=-1", "weight_decay=-5", "layerwise_lr_decay_bound=-2", "warmup_ratio=3",
        "num_train_epochs=0", "num_train_epochs=-2", "eval_steps=-2", "decay_steps=-5",
        "learning_rate=inf", "port=70000", "no_recompute_layers=1,-1",
    ],
)  # fmt: skip
def test_numbers_outside_of_their_range_are_refused(word: str, capsys) -> None:
    assert main(["train", word]) == 2
    assert re.search(r"=\S+ is (too small|too large|not finite); give ", capsys.readouterr().err)


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


def test_every_setting_is_in_the_help_of_a_verb() -> None:
    assert {group for verb in VERBS.values() for group in verb.groups} == set(config.GROUPS)


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
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "erniekit: there is no command 'trian'; did you mean 'train'?"


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
        ({"lr_scheduler_type": "wsd:50", "min_lr": 0.2}, {5: 0.5, 10: 1, 50: 1, 100: 0.2}),
        ({"lr_scheduler_type": "wsd:50", "decay_function": "1-sqrt"}, {50: 1, 68: 0.4, 100: 0}),
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
    expected = [0.4, 0.4, 0.5 * 0.55, 4 * 0.55, 1.0]
    assert [t.factor for t in found.values()] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("variables", "words", "told"),
    [
        ({"NNODES": "two"}, [], "NNODES=two is not a number of machines"),
        ({"WORLD_SIZE": "2"}, [], "RANK is not set"),
        ({}, ["nproc_per_node=2", "sharding=stage1", "sharding_parallel_degree=3"], "there are 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["do_train=false"], "erniekit eval runs in one process"),
    ],
)
def test_processes_that_do_not_fit_are_refused(
    variables: dict, words: list[str], told: str, monkeypatch, capsys
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = ["model_name_or_path=x", "eval_dataset_path=x", "device=cpu"]
    assert main(["train", *settings, *words]) == 2
    assert told in capsys.readouterr().err


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'ERNIE-4\.5-0\.3B'"):
        config_of("baidu/ERNIE-4.5-0.3-Paddle")


def test_chunks_of_the_loss_are_larger_on_a_gpu_unless_given() -> None:
    for words, expected in (([], (128, 4096)), (["loss_subbatch_seqlen=77"], (77, 77))):
        run = read_run(words)
        sizes = tuple(resolved(run, d).model.loss_subbatch_seqlen for d in ("cpu", "cuda"))
        assert sizes == expected
    with pytest.raises(ConfigError, match="loss_subbatch_seqlen=0 is too small"):
        read_run(["loss_subbatch_seqlen=0"])
