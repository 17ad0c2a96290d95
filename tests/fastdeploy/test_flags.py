"""What may be written after `serve`: every spelling ends in the same field, nothing is dropped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ernie.settings import ConfigError
from fastdeploy.cli import KINDS
from fastdeploy.config import ServerConfig
from fastdeploy.flags import (
    ENVIRONMENT,
    REASONS,
    SHORT,
    UNSUPPORTED,
    flags_of,
    help_text,
    read_config,
    read_flags,
)

ROOT = Path(__file__).parents[2]


def read(*words: str, **environment: str):
    return read_config(KINDS, read_flags(words, KINDS, environment), "the flags")


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["m"], "model", "m"),
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["-tp=2"], "tensor_parallel_size", 2),
        (["--tensor_parallel_size", "2"], "tensor_parallel_size", 2),
        (["-q", "wint8"], "quantization", "wint8"),
        (["--max-logprobs", "-1"], "max_logprobs", -1),
        (["--enable-lora"], "enable_lora", True),
        (["--enable-lora", "false"], "enable_lora", False),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--no_enable_prefix_caching=false"], "enable_prefix_caching", True),
        (["--enforce-eager"], "use_cudagraph", False),
        (["--log-requests", "--port", "1"], "enable_log_requests", True),
        (["--disable-log-requests"], "enable_log_requests", False),
        (["--uvicorn-log-level", "warning"], "log_level", "warning"),
        (["--served-model-name", "a", "b"], "served_model_name", ["a", "b"]),
        (["--api-key", "a", "--api-key", "b,c", "--api-key=d"], "api_key", ["a", "b", "c", "d"]),
        (["--allowed-origins", '["*"]'], "allowed_origins", ["*"]),
        (
            ["--speculative-config", '{"method": "ngram"}'],
            "speculative_config",
            {"method": "ngram"},
        ),
    ],
)
def test_every_spelling_reaches_its_field(words: list[str], name: str, expected: object) -> None:
    words = words if words == ["m"] else ["--model", "m", *words]
    config = next(c for c in read(*words) if name in c.__dataclass_fields__)
    assert getattr(config, name) == expected


def test_flags_win_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: a\nport: 5\nmax-num-seqs: 3\ndisable_log_requests: false\ntp: 1\n")
    engine, server = read("--config", str(path), "--port", "6", FD_API_KEY="k1,k2", PORT="9")
    assert (engine.model, engine.max_num_seqs, server.port) == ("a", 3, 6)
    assert server.api_key == ["k1", "k2"] and server.enable_log_requests
    assert read("--config", str(path), "--api-key", "k3", FD_API_KEY="k")[1].api_key == ["k3"]
    path.write_text("modle: a\n")
    with pytest.raises(ConfigError, match=r"unknown key 'modle' in .*yaml; did you mean 'model'"):
        read("--config", str(path))


def test_no_spelling_means_two_things() -> None:
    flags = flags_of(KINDS)
    names = [f.name for f in flags] + [a.lstrip("!") for f in flags for a in f.aliases]
    names += ["no_" + f.name for f in flags if f.arity == "switch"]
    names += [*UNSUPPORTED, *SHORT, "config"]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    assert set(REASONS) <= set(UNSUPPORTED) and set(ENVIRONMENT.values()) <= {f.name for f in flags}
    assert all(f.group and f.help for f in flags)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_there_is_accepted_only_where_it_asks_for_nothing(name: str) -> None:
    flag, neutral = "--" + name.replace("_", "-"), UNSUPPORTED[name][0]
    assert read("m", f"{flag}={neutral}")[0].model == "m"
    neutral = {str(value).lower() for value in UNSUPPORTED[name]}
    other = next(v for v in ("true", "false", "something") if v not in neutral)
    with pytest.raises(ConfigError, match=f"^{name}="):
        read("m", f"{flag}={other}")


def test_help_names_every_flag_its_default_and_its_group() -> None:
    text = help_text("serve", "About.", KINDS)
    for flag in flags_of(KINDS):
        assert flag.long[2:] in text and f"\n{flag.group}:\n" in text, flag.name
        assert f"[{flag.default_text}]" in text.replace("\n      ", " "), flag.name
    assert max(map(len, text.splitlines())) <= 120


def test_keys_come_from_flags_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nk2\n\n  k3 \n")
    assert ServerConfig(api_key=["k1"], api_key_file=str(path)).all_keys() == ("k1", "k2", "k3")
    assert ServerConfig(host="0.0.0.0", api_key_file=str(path)).all_keys() == ("k2", "k3")
    assert ServerConfig(host="0.0.0.0", insecure_allow_no_key=True).all_keys() == ()
    for text, message in (("# none\n", "has no key"), ("two words\n", "no header carries")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ServerConfig(api_key_file=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerConfig(api_key_file=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "host=0.0.0.0 lets other machines in"),
        ({"host": "0.0.0.0", "api_key": ["k"], "insecure_allow_no_key": True}, "leave out one"),
        ({"api_key": ["schlüssel"]}, "ASCII"),
        ({"api_key": ["a b"]}, "ASCII"),
        ({"max_concurrency_per_key": 2}, "needs keys"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"max_waiting_time": -2}, "max_waiting_time=-2"),
        ({"max_num_waiting": 0}, "max_num_waiting=0"),
        ({"allowed_origins": ["example.com"]}, "scheme://host"),
        ({"traces_enable": True, "traces_exporter": "otlp"}, "needs exporter_otlp_endpoint"),
        ({"exporter_otlp_endpoint": "http://x"}, "needs traces_enable"),
        ({"served_model_name": [""]}, "served_model_name is empty"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)


def test_the_tables_of_the_documentation_are_up_to_date() -> None:
    command = [sys.executable, "docs/serving.py", "--check"]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_documentation_have_flags_that_exist() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("## Reference")[0]
    known = {name.split()[0] for flag in flags_of(KINDS) for name in (flag.long, *flag.spellings)}
    foreign = {"--stop-timeout", "--rm", "--create-home", "--no-cache-dir"}
    foreign |= {"--no-install-recommends", "--config", "--model", "--no-web"}
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert len(written) > 20 and written <= known | foreign, written - known - foreign
    example = yaml.safe_load(re.search(r"```yaml\n(model:.*?)```", page, re.S)[1])
    with pytest.raises(ConfigError, match="/etc/fastdeploy/keys cannot be read"):
        read_config(KINDS, example, "the example")
    read_config(KINDS, example | {"api_key_file": None, "api_key": "k"}, "the example")
