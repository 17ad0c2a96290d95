"""Every way a model folder can be wrong: refused in a sentence that names file and tensor.

Also the hub, as far as it can be tested where there is none.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import ernie
from ernie.checkpoint import hub
from ernie.checkpoint.folder import INDEX, CheckpointError
from ernie.settings import ConfigError
from ernie.tokenizer import FILES
from tests.helpers import hf_dense, hf_moe, saved

SHARD = "model-00002-of-0000"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "single": saved(hf_dense(1), root / "single"),
        "sharded": saved(hf_dense(1), root / "sharded", max_shard_size="60KB"),
        "moe": saved(hf_moe(2), root / "moe"),
    }


@pytest.fixture
def bad(folders, tmp_path):
    """A copy of a good folder, to be broken."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / kind))

    return copy


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def change_header(file: Path, change) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, *parts: str, kind: type = CheckpointError) -> None:
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        ernie.load(folder)
    message = str(caught.value)
    assert time.monotonic() - start < 10
    for part in parts:
        assert part in message, message
    assert "\n" not in message and not message.endswith(".") and len(message) < 500, message


# --- files ---


def test_folder_without_config(bad):
    folder = bad("single")
    (folder / "config.json").unlink()
    refused(folder, "no config.json", kind=ConfigError)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_config_that_is_not_an_object(bad, text):
    folder = bad("single")
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", kind=ConfigError)


def test_folder_without_weights(bad):
    folder = bad("single")
    (folder / "model.safetensors").unlink()
    refused(folder, "no *.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model_state.pdparams"])
def test_pickle_is_refused_unopened(bad, name):
    folder = bad("single")
    (folder / "model.safetensors").unlink()
    # Unpickling this would raise something else.
    (folder / name).write_bytes(b"cbuiltins\nexec\n(S'raise KeyboardInterrupt'\ntR.")
    refused(folder, name, "pickle")


def test_missing_shard(bad):
    folder = bad("sharded")
    second_shard(folder).unlink()
    refused(folder, SHARD, "lacks")


def test_missing_shard_without_index(bad):
    folder = bad("sharded")
    second_shard(folder).unlink()
    (folder / INDEX).unlink()
    refused(folder, SHARD, "lacks")


def test_shards_without_index_are_enough(bad):
    folder = bad("sharded")
    (folder / INDEX).unlink()
    ernie.load(folder)


def test_extra_shard(bad):
    folder = bad("sharded")
    shutil.copy(second_shard(folder), folder / "model-00009-of-00009.safetensors")
    refused(folder, "model-00009-of-00009.safetensors", "does not name")


def test_tensor_in_two_files(bad):
    folder = bad("single")
    save_file({"model.norm.weight": torch.ones(48)}, folder / "more.safetensors")
    refused(folder, "model.norm.weight", "more.safetensors", "both")


@pytest.mark.parametrize("index", ["{}", "[]", "[" * 100_000, '{"weight_map": {"a": "../b"}}'])
def test_broken_index(bad, index):
    folder = bad("sharded")
    (folder / INDEX).write_text(index)
    refused(folder, INDEX)


def test_index_of_other_files(bad):
    folder = bad("sharded")
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "model.norm.weight", file, INDEX)


def test_index_that_names_a_tensor_twice(bad):
    folder = bad("sharded")
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refused(folder, INDEX, "lists a twice")


# --- headers ---


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -5000])
def test_truncated_file(bad, kept):
    folder = bad("sharded")
    file = second_shard(folder)
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, file.name, "truncated")


def test_bytes_after_the_data(bad):
    folder = bad("single")
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"1234")
    refused(folder, "model.safetensors", "damaged")


def test_header_longer_than_the_file(bad):
    folder = bad("single")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    refused(folder, "model.safetensors", str(2**62))


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"x": 1}', b'{"x": {"dtype": "F32"}}']
)
def test_header_that_is_not_a_table(bad, header):
    folder = bad("single")
    change_header(folder / "model.safetensors", lambda _: header)
    refused(folder, "model.safetensors", "again")


def test_name_twice_in_a_header(bad):
    folder = bad("single")

    def twice(header):
        entry = json.dumps(header["model.norm.weight"])
        return json.dumps(header)[:-1].encode() + f', "model.norm.weight": {entry}}}'.encode()

    change_header(folder / "model.safetensors", twice)
    refused(folder, "model.safetensors", "model.norm.weight", "twice")


def moved(header, by: int):
    header["model.norm.weight"]["data_offsets"] = [
        offset + by for offset in header["model.norm.weight"]["data_offsets"]
    ]
    return header


@pytest.mark.parametrize(("by", "word"), [(-48 * 4, "overlaps"), (48 * 4, "gap")])
def test_offsets_that_overlap_or_leave_a_gap(bad, by, word):
    folder = bad("single")
    change_header(folder / "model.safetensors", lambda header: moved(header, by))
    refused(folder, "model.safetensors", "model.norm.weight", word)


@pytest.mark.parametrize("offsets", [[-8, 184], [192, 0], [0, 2**60], [0.0, 192.0]])
def test_offsets_that_are_no_place(bad, offsets):
    folder = bad("single")

    def change(header):
        header["model.norm.weight"]["data_offsets"] = offsets
        return header

    change_header(folder / "model.safetensors", change)
    refused(folder, "model.safetensors", "model.norm.weight")


@pytest.mark.parametrize("dtype", ["I8", "F64", "F8_E4M3", "BOOL", "nonsense", 7])
def test_dtype_that_is_no_weight(bad, dtype):
    folder = bad("single")

    def change(header):
        header["model.norm.weight"]["dtype"] = dtype
        return header

    change_header(folder / "model.safetensors", change)
    refused(folder, "model.safetensors", "model.norm.weight", str(dtype))


# --- tensors ---


def test_wrong_shape(bad):
    folder = bad("single")
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(96, 47)}))
    refused(folder, "model.safetensors", name, "96 x 47", "96 x 48")


def test_unknown_tensor(bad):
    folder = bad("single")
    name = "model.layers.1.self_attn.q_norm.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(16)}))
    refused(folder, "model.safetensors", name, "no place")


def test_head_beside_a_tied_embedding(bad):
    folder = bad("single")
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(199, 48)}))
    refused(folder, "lm_head.weight")


def test_missing_tensor(bad):
    folder = bad("moe")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"{folder} holds no {name}")


def test_vocabulary_of_another_model(bad):
    folder = bad("single")
    change_config(folder, vocab_size=200)
    refused(folder, "model.embed_tokens.weight", "199 x 48", "200 x 48", "vocab_size")


def test_tokenizer_of_another_model(bad):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = bad("single")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    refused(folder, "ids up to 255", "vocab_size=199")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, -1])
def test_weights_that_are_not_numbers(bad, value, dtype, place):
    folder = bad("single")
    name = "model.layers.2.mlp.down_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name][place, place] = value

    change_tensors(folder, change)
    refused(folder, "model.safetensors", name, "NaN, Inf")


def test_number_beyond_the_wanted_dtype(bad):
    folder = bad("single")
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*beyond torch\.float16"):
        ernie.load(folder, dtype=torch.float16)


def test_quantised_folder(bad):
    folder = bad("single")
    change_config(folder, quantization_config={"quantization": "wint8"})
    refused(folder, "quantization_config")


def test_config_of_another_family(bad):
    folder = bad("single")
    change_config(folder, model_type="llama")
    refused(folder, "llama", kind=ConfigError)


def test_generation_config_that_is_not_json(bad):
    folder = bad("single")
    (folder / "generation_config.json").write_text("{")
    refused(folder, "generation_config.json")


def test_random_bytes_in_the_header_never_end_in_another_error(bad):
    folder = bad("single")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    generator = torch.Generator().manual_seed(0)
    refusals = 0
    for _ in range(300):
        place, value = torch.randint(0, 2**31, (2,), generator=generator).tolist()
        data = bytearray(good)
        data[place % (8 + length)] = value % 256
        file.write_bytes(data)
        try:
            ernie.load(folder)
        except CheckpointError:
            refusals += 1
    assert refusals > 200, refusals


# --- paths and the hub ---


def test_path_that_is_a_file(bad):
    folder = bad("single")
    refused(folder / "config.json", "is a file")


@pytest.mark.parametrize(
    "name", ["no_such_folder", "./no_such_folder", "/no/such/folder", "a/b/c", "../x", "a b/c"]
)
def test_path_that_is_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the tests run, something may lie beside it
    with pytest.raises(CheckpointError, match="there is no folder"):
        hub.resolve(name)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("offline and not cached"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "cannot be reached"),
        (httpx.ConnectError("no route"), "cannot be reached"),
        (httpx.ReadTimeout("slow"), "cannot be reached"),
        (errors.HfHubHTTPError("500", response=response(500)), "cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "no such public"),
        (errors.GatedRepoError("403", response=response(403)), "no such public"),
        (errors.HFValidationError("bad name"), "no such public"),
    ],
)
def test_hub_that_fails(monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        ernie.load("baidu/ERNIE-4.5-0.3B-PT")
    message = str(caught.value)
    for part in (words, "baidu/ERNIE-4.5-0.3B-PT", "HF_ENDPOINT", "HF_HUB_OFFLINE", "folder"):
        assert part in message


def test_hub_name_is_fetched_without_code_or_pickles(monkeypatch, folders):
    calls = []

    def fetch(name, *, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folders["single"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert ernie.load("baidu/ERNIE-4.5-0.3B-PT").config.vocab_size == 199
    (name, patterns), *rest = calls
    assert name == "baidu/ERNIE-4.5-0.3B-PT" and not rest
    assert not any(Path("x.py").match(p) or Path("x.bin").match(p) for p in patterns)
    wanted = [
        *(name.replace("*", "tool_use") for name in FILES),
        "config.json",
        "model-00001-of-00002.safetensors",
    ]
    assert set(filter_repo_objects(wanted, allow_patterns=patterns)) == set(wanted)
