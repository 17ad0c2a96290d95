"""What a model was trained with travels with it, and a server refuses anything else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ernie.chat import LLM, LOCK_FILE, THINKING, UNTRAINED, ChatError, ChatTemplate
from ernie.chat.lock import MASK_RULE, changes, template_hash, tokenizer_hash, write_lock
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from erniekit.cli import main
from fastdeploy import LLM as Engine
from fastdeploy.config import EngineConfig
from fastdeploy.engine.language import Language
from tests.helpers_tokenizer import CHATML, byte_level_folder, sentencepiece_folder

JINJA = (
    "<|begin_of_sentence|>{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] "
    "}}\n{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}<|end_of_sentence|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
SIZES = {"max_model_len": 64, "num_gpu_blocks_override": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """A model folder that brings its own template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny("tiny-dense"), folder)
    (folder / "chat_template.jinja").write_text(JINJA)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory):
    """Output folders of a step of training with `base`, by fine_tuning."""
    root = tmp_path_factory.mktemp("trained")
    for kind in ("Full", "LoRA"):
        assert main(["train", *words(base, data, root / kind, kind)]) == 0
    assert main(["export", *words(base, data, root / "LoRA", "LoRA")]) == 0
    return root


def words(base: Path, data: Path, output: Path, kind: str) -> list[str]:
    values = {
        "model_name_or_path": base, "train_dataset_path": data / "train.jsonl",
        "output_dir": output, "fine_tuning": kind, "max_steps": 1, "max_seq_len": 96,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def copy(trained: Path, tmp_path: Path):
    """A function from a folder of `trained` to a copy that may be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(trained / name, tmp_path / "copy"))

    return make


FOLDERS = ("Full", "Full/checkpoint-1", "LoRA/export")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_trained_folder_is_served_as_it_is(name: str, trained: Path) -> None:
    assert (trained / name / LOCK_FILE).is_file()
    Language.read(EngineConfig(model=str(trained / name)))


@pytest.mark.parametrize("name", FOLDERS)
def test_one_space_more_in_the_template_is_refused_with_both_hashes(name: str, copy) -> None:
    folder = copy(name)
    before = json.loads((folder / LOCK_FILE).read_text())["template"]
    (folder / "chat_template.jinja").write_text(JINJA.replace("User: ", "User:  "))
    with pytest.raises(ConfigError, match=before) as caught:
        Language.read(EngineConfig(model=str(folder)))
    now = re.findall(r"\b[0-9a-f]{16}\b", str(caught.value))
    assert len(set(now)) == 2, str(caught.value)
    with pytest.raises(ConfigError, match="would not be served as it was trained"):
        Engine(str(folder), **SIZES)


def test_a_changed_template_is_served_when_it_is_meant(copy, caplog) -> None:
    folder = copy("Full")
    (folder / "chat_template.jinja").write_text(JINJA + " ")
    Engine(str(folder), ignore_training_template=True, **SIZES)
    assert "would not be served as it was trained" in caplog.text


def test_a_template_or_tokenizer_given_beside_the_model_is_compared_too(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    folder = str(trained / "Full")
    Language.read(EngineConfig(model=folder, chat_template=JINJA))
    with pytest.raises(ConfigError, match="its chat template was"):
        Language.read(EngineConfig(model=folder, chat_template=JINJA + "\n"))
    other = sentencepiece_folder(tmp_path / "other", vocab_size=560)
    shutil.copy(base / "chat_template.jinja", other)
    with pytest.raises(ConfigError, match="its tokenizer was"):
        Language.read(EngineConfig(model=folder, tokenizer=str(other)))


def test_a_folder_that_says_nothing_is_served(base: Path) -> None:
    assert not (base / LOCK_FILE).exists()
    Language.read(EngineConfig(model=str(base)))
    other = JINJA.replace("User: ", "Human: ")
    Language.read(EngineConfig(model=str(base), chat_template=other))


def test_an_adapter_is_not_offered_beside_another_template(copy, base: Path) -> None:
    folder = copy("LoRA")
    shutil.rmtree(folder / "export")
    engine = Engine(str(base), enable_lora=True, **SIZES)
    engine.load_lora("a", str(folder))
    lock = json.loads((folder / LOCK_FILE).read_text())
    (folder / LOCK_FILE).write_text(json.dumps(lock | {"template": "0" * 16}))
    with pytest.raises(ConfigError, match="adapter 'b' would not be served as it was trained"):
        engine.load_lora("b", str(folder))


def test_what_is_made_of_a_trained_model_keeps_its_lock(trained: Path, tmp_path: Path) -> None:
    full, lock = trained / "Full", (trained / "Full" / LOCK_FILE).read_text()
    assert main(["quantize", str(full), str(tmp_path / "quantised")]) == 0
    assert main(["merge", str(full), str(full), str(tmp_path / "merged")]) == 0
    assert main(["split", f"output_dir={full}"]) == 0
    for folder in (tmp_path / "quantised", tmp_path / "merged", full / "split_export"):
        assert (folder / LOCK_FILE).read_text() == lock, folder


def test_a_damaged_file_is_named(copy) -> None:
    folder = copy("Full")
    (folder / LOCK_FILE).write_text("{}")
    with pytest.raises(ChatError, match=f"{LOCK_FILE} is damaged"):
        Language.read(EngineConfig(model=str(folder)))


# --- the hashes ---


def test_hashes_of_copies_are_equal_and_of_others_not(tmp_path: Path) -> None:
    one = sentencepiece_folder(tmp_path / "a", thinking=True)
    shutil.copytree(one, tmp_path / "b")
    found = [Tokenizer.from_folder(folder) for folder in (one, tmp_path / "b")]
    other = Tokenizer.from_folder(byte_level_folder(tmp_path / "c"))
    assert tokenizer_hash(found[0]) == tokenizer_hash(found[1]) != tokenizer_hash(other)
    assert template_hash(LLM, found[0]) == template_hash(LLM, found[1])
    templates = [LLM, THINKING, ChatTemplate.from_sources({"default": JINJA}, "x", found[0])]
    assert len({template_hash(template, found[0]) for template in templates}) == 3


def test_where_a_template_lies_makes_no_difference(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a")
    tokenizer = Tokenizer.from_folder(folder)
    write_lock(folder, ChatTemplate.for_folder(folder), tokenizer)
    (folder / "chat_template.jinja").write_text(CHATML)
    again = Tokenizer.from_folder(folder)
    assert changes(folder, ChatTemplate.for_folder(folder), again) == ""


def test_the_rule_of_the_mask_is_the_one_that_is_named(tmp_path: Path) -> None:
    """A failure says that the rule has changed: change MASK_RULE, and then what stands here."""
    dialogue = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "label": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    family = Tokenizer.from_folder(sentencepiece_folder(tmp_path / "a", thinking=True))
    chatml = Tokenizer.from_folder(byte_level_folder(tmp_path / "b"))
    folder_template = ChatTemplate.from_sources({"default": CHATML}, "x", chatml)
    trained = []
    for template, tokenizer in ((LLM, family), (THINKING, family), (folder_template, chatml)):
        labels = template.encode(tokenizer, dialogue, add_generation_prompt=False).labels
        trained.append(" ".join(str(tokenizer.token_of(i)) for i in labels if i != UNTRAINED))
    assert MASK_RULE == "answers, each with its end token; eos in place of <|end_of_sentence|>; 1"
    assert trained == [
        "a </s>",
        "<0x0A> </think> <0x0A> <0x0A> <response> <0x0A> a <0x0A> </response> <0x0A> <|im_end|>",
        "a <|im_end|>",
    ]
