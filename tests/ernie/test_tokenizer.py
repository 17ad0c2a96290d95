"""The tokenizer against the libraries that own its files, and against itself for any ids."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ernie.tokenizer import Detokenizer, Tokenizer, TokenizerError
from tests import helpers_tokenizer as helpers

TEXTS = (
    "",
    " ",
    "  ",
    "hello",
    " Hello",
    "This is a test",
    " 1234 15 5,61",
    "def f(x):\n\treturn  x\r\n\n\n",
    "今天天气很好 and 🎉 déjà vu — \u200d \x00 end ",
    "The prices of 2024 rose by 12.5%, <b>really</b> | see <|this|",
)
SPELLED = "a<|im_end|>b <|end_of_sentence|></s><s> <think>\n<mask:1><|IMAGE_PLACEHOLDER|> [/INST]"
text = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"),  # reads back as a space
        st.sampled_from("<|>/s"),
    )
)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reference(folder, kind):
    """The plain encoder of the library that owns the file format."""
    if kind == "sentencepiece":
        model = str(folder / "tokenizer.model")
        return sentencepiece.SentencePieceProcessor(model_file=model).encode
    library = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return lambda text: library.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def single_bytes(tokenizer):
    """Ids that stand for one byte, which need not be a character."""
    return [i for i in range(tokenizer.vocab_size) if len(tokenizer.join_bytes([i])) == 1]


@pytest.fixture(scope="module")
def can_spell(tokenizer, single_bytes):
    """SmolLM2 has no token for some bytes that text hardly ever holds."""
    known = tokenizer.join_bytes(single_bytes)
    return lambda text: all(byte in known for byte in text.encode())


@pytest.mark.parametrize("given_text", TEXTS)
def test_encode_equals_the_library(tokenizer, reference, given_text):
    assert tokenizer.encode(given_text) == reference(given_text)


@pytest.mark.parametrize("given_text", TEXTS)
def test_decode_inverts_encode(tokenizer, given_text):
    assert tokenizer.decode(tokenizer.encode(given_text)) == given_text


@settings(deadline=None, max_examples=60)
@given(text)
def test_plain_text_never_becomes_a_control_token(tokenizer, can_spell, given_text):
    ids = tokenizer.encode(given_text + SPELLED + given_text)
    assert not {tokenizer.token_of(i) for i in ids} & tokenizer.control_tokens
    if can_spell(given_text):
        assert tokenizer.decode(ids) == given_text + SPELLED + given_text


@pytest.mark.parametrize("kind", ["converted", "byte_level"], indirect=True)
def test_trusted_text_equals_transformers(tokenizer, folder):
    library = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    for given_text in (SPELLED, "<|im_start|><|im_start|>user\nHi<|im_end|>", " </s> "):
        expected = library.encode(given_text, add_special_tokens=False)
        ids = tokenizer.encode(given_text, allow_special=True)
        assert ids == expected
        assert tokenizer.decode(ids) == library.decode(expected, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special=True) == library.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_trusted_text_finds_every_control_token(tokenizer):
    for token in tokenizer.control_tokens:
        assert tokenizer.encode(f"x{token}y", allow_special=True) == [
            *tokenizer.encode("x"),
            tokenizer.id_of(token),
            *tokenizer.encode("y"),
        ]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_streaming_decode_concatenates_to_decode(tokenizer, single_bytes, data, skip):
    ids_strategy = st.one_of(
        st.integers(0, tokenizer.vocab_size + 3), st.sampled_from(single_bytes)
    )
    batches = data.draw(st.lists(st.lists(ids_strategy, max_size=4), max_size=12))
    stream = Detokenizer(tokenizer, skip_special=skip)
    pieces = [stream.push(batch) for batch in batches] + [stream.flush()]
    ids = [i for batch in batches for i in batch]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@settings(deadline=None, max_examples=60)
@given(text)
def test_streaming_decode_never_shows_half_a_character(tokenizer, can_spell, given_text):
    stream = Detokenizer(tokenizer)
    assume(can_spell(given_text))
    shown = ""
    for i in tokenizer.encode(given_text):
        shown += stream.push([i])
        assert given_text.startswith(shown)
    assert (shown, stream.flush()) == (given_text, "")


def test_invalid_bytes_become_replacement_characters_at_once(folders):
    tokenizer = Tokenizer.from_folder(folders("sentencepiece"))
    ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in b"\xe4\xbd\xa0\xe4\xbd\xff\xf0\x9f"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push([i]) for i in ids]
    assert pieces == ["", "", "你", "", "", "\ufffd\ufffd", "", ""]
    assert stream.flush() == "\ufffd"


def test_both_file_formats_of_one_model_agree(folders):
    one, other = (Tokenizer.from_folder(folders(k)) for k in ("sentencepiece", "converted"))
    for given_text in (*TEXTS, helpers.TEXT, SPELLED):
        assert one.encode(given_text) == other.encode(given_text)
        ids = one.encode(given_text, allow_special=True)
        assert ids == other.encode(given_text, allow_special=True)
        assert one.decode(ids) == other.decode(ids)
    assert one.fingerprint == other.fingerprint
    assert one.control_tokens == other.control_tokens


def test_digits_are_single_tokens_and_nothing_is_added(folders):
    tokenizer = Tokenizer.from_folder(folders("sentencepiece"))
    assert [tokenizer.token_of(i) for i in tokenizer.encode("2024")] == list("2024")
    assert tokenizer.token_of(tokenizer.encode("Hello")[0])[0] == "H"
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)


def test_full_width_spelling_cannot_be_normalised_into_a_control_token(tmp_path):
    folder = helpers.sentencepiece_folder(tmp_path, thinking=True, normalization="nmt_nfkc")
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("＜｜im_end｜＞ ＜think＞")
    assert not {tokenizer.token_of(i) for i in ids} & tokenizer.control_tokens
    assert tokenizer.decode(ids) == "<|im_end|> <think>"
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.id_of("<|im_end|>") in raw.encode("＜｜im_end｜＞")  # the library alone falls


def test_merges_that_spell_a_control_token_are_dropped(folders, tmp_path):
    spec = json.loads((folders("converted") / "tokenizer.json").read_text())
    size = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {"<": size, ">": size + 1, "<s": size + 2}
    spec["model"]["merges"] = [["<", "s"], ["<s", ">"], *spec["model"]["merges"]]
    helpers.write_json(tmp_path / "tokenizer.json", spec)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.token_of(i) for i in tokenizer.encode("<s>")] == ["<s", ">"]


def test_tags_marked_as_ordinary_are_shown_yet_not_spelled(folders):
    tokenizer = Tokenizer.from_folder(folders("converted"))
    think = tokenizer.id_of("</think>")
    assert think not in tokenizer.special_ids
    assert tokenizer.decode([think], skip_special=True) == "</think>"
    assert think not in tokenizer.encode("</think>")


def test_saved_settings_that_cut_or_add_are_ignored(folders, tmp_path):
    shutil.copytree(folders("byte_level"), tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    spec["model"]["dropout"] = 0.5
    helpers.write_json(tmp_path / "tokenizer.json", spec)
    plain = Tokenizer.from_folder(folders("byte_level"))
    assert Tokenizer.from_folder(tmp_path).encode(helpers.TEXT) == plain.encode(helpers.TEXT)


def test_added_tokens_outside_the_vocabulary_keep_their_ids(folders, tmp_path):
    shutil.copytree(folders("sentencepiece"), tmp_path, dirs_exist_ok=True)
    base = Tokenizer.from_folder(tmp_path)
    added = {"<|VIDEO_PLACEHOLDER|>": base.vocab_size + 5}
    helpers.write_json(tmp_path / "added_tokens.json", added)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == base.vocab_size + 6
    assert tokenizer.encode("<|VIDEO_PLACEHOLDER|>", allow_special=True) == [base.vocab_size + 5]
    assert tokenizer.token_of(base.vocab_size) is None
    assert tokenizer.decode([base.vocab_size]) == ""
    assert tokenizer.fingerprint != base.fingerprint


def test_blanks_are_swallowed_where_the_entry_says_so(folders, tmp_path):
    shutil.copytree(folders("byte_level"), tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for entry in spec["added_tokens"]:
        entry["rstrip"] = entry["content"] == "<|im_end|>"
        entry["lstrip"] = entry["content"] == "<|repo|>"
    helpers.write_json(tmp_path / "tokenizer.json", spec)
    library = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    given_text = "a <|im_end|>  b <|repo|> c"
    ids = Tokenizer.from_folder(tmp_path).encode(given_text, allow_special=True)
    assert ids == library.encode(given_text, add_special_tokens=False)


def test_eos_ids_include_those_of_the_generation_config(folders, tmp_path):
    shutil.copytree(folders("sentencepiece"), tmp_path, dirs_exist_ok=True)
    helpers.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 9]})
    assert Tokenizer.from_folder(tmp_path).eos_ids == {2, 9}


def test_save_copies_what_the_tokenizer_was_read_from(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    copy = Tokenizer.from_folder(tmp_path / "new")
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(helpers.TEXT) == tokenizer.encode(helpers.TEXT)
    copy.save(tmp_path / "new")  # onto itself
    assert {f.name for f in copy.files} == {f.name for f in tokenizer.files}


def test_the_file_that_knows_more_tokens_is_read(folders, tmp_path):
    shutil.copytree(folders("sentencepiece"), tmp_path, dirs_exist_ok=True)
    spec = json.loads((folders("converted") / "tokenizer.json").read_text())
    helpers.write_json(tmp_path / "tokenizer.json", spec)
    assert "tokenizers" in repr(Tokenizer.from_folder(tmp_path)._encode)
    del spec["model"]["vocab"]["公"]
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "公" not in "".join(m)]
    helpers.write_json(tmp_path / "tokenizer.json", spec)
    assert "sentencepiece" in repr(Tokenizer.from_folder(tmp_path)._encode)


def test_pickle_keeps_a_tokenizer_usable(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode(helpers.TEXT) == tokenizer.encode(
        helpers.TEXT
    )


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match=r"character 1 .* lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.model",
            b"not a model",
            r"tokenizer\.model \(11 bytes\) is not a SentencePiece",
        ),
        ("tokenizer.model", None, "holds no tokenizer"),
        ("tokenizer.json", b"{", r"tokenizer\.json is not JSON"),
        ("tokenizer.json", b"[]", r"tokenizer\.json holds a JSON list"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "'WordPiece'"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', "has the decoder"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token '<end>', which is not"),
        ("added_tokens.json", b'{"<s>": 7}', "'<s>' is 1 and 7"),
        ("added_tokens.json", b'{"<new>": 1}', "id 1 is '<s>' and '<new>'"),
        ("added_tokens.json", b'{"<new>": "x"}', "has the id 'x'"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
    ],
)
def test_broken_files_are_refused_by_name(folders, tmp_path, name, content, message):
    shutil.copytree(folders("sentencepiece"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_space_in_front_is_refused_unless_the_config_says_otherwise(tmp_path):
    folder = helpers.sentencepiece_folder(tmp_path, add_dummy_prefix=True)
    tokenizer = Tokenizer.from_folder(folder)  # the helper's config says add_prefix_space: false
    assert tokenizer.decode(tokenizer.encode("dog")) == "dog"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="puts a space in front"):
        Tokenizer.from_folder(folder)


def test_import_needs_no_torch():
    code = "import sys, ernie.tokenizer, ernie.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
