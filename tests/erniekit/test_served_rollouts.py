"""What a server of rollouts is told and given, without one: weights, pauses, keys, leftovers."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

import ernie
from ernie.attention import packed_causal
from ernie.chat import stop_ids
from ernie.model import ErnieModel
from ernie.rollout import Sampling, rollout
from ernie.settings import ConfigError
from erniekit import samplers
from erniekit.build import build_model, read_model
from erniekit.config import Run, resolved, run_from
from erniekit.samplers import NO_PENALTIES, Own, Served, merged
from fastdeploy.sampling import _RECOMMENDED

IDS = [5, 6, 7, 8, 9, 10, 11]


def run_of(folder: Path, output: Path, **more: object) -> Run:
    values = {
        "stage": "UPO", "model_name_or_path": str(folder), "output_dir": str(output),
        "rollout_server": "http://127.0.0.1:9", "lora_rank": 4,
    } | more  # fmt: skip
    return resolved(run_from(values), "cpu")


@torch.no_grad()
def trained(run: Run) -> ErnieModel:
    """The model of a run whose trained parts are not where they began."""
    model = build_model(run, "cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def hidden(model: ErnieModel) -> torch.Tensor:
    bounds = torch.tensor([0, len(IDS)], dtype=torch.int32)
    return model.hidden(torch.tensor(IDS), torch.arange(len(IDS)), packed_causal(bounds))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


FORMS = [
    {"compute_type": kind, **form}
    for kind in ("bf16", "wint8", "wint4/8", "nf4")
    for form in ({}, {"use_dora": True}, {"pissa": True})
]
FORMS += [{"fine_tuning": "Full"}, {"compute_type": "nf4", "qlora_weight_double_quant": True}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_server_is_given_what_the_policy_computes(
    name: str, form: dict, tiny, tmp_path: Path, monkeypatch
) -> None:
    run = run_of(tiny(name), tmp_path / "out", **form)
    model, told = trained(run), []

    def post(self: Served, path: str, body: dict | None = None) -> None:
        told.append(path)
        if body:
            given = ernie.load(body["path"], dtype=torch.float32)
            told.append(distance(hidden(given), hidden(model)))

    monkeypatch.setattr(Served, "_post", post)
    Served(run, "cpu").update(model)
    pause, update, gap, resume = told
    assert [pause, update, resume] == ["/v1/pause", "/v1/update_weights", "/v1/resume"]
    # Weights are rounded to bfloat16, and a token near a border goes to another expert.
    assert gap < (0.06 if "moe" in name else 0.01), f"off by {gap}"
    untrained = distance(hidden(ernie.load(tiny(name), dtype=torch.float32)), hidden(model))
    assert untrained > 5 * gap, f"{untrained} is what it was before training: this shows nothing"


def test_a_merged_model_answers_by_itself_and_not_by_the_base_of_the_run(
    tiny, tmp_path: Path
) -> None:
    run = run_of(tiny("tiny-dense"), tmp_path / "out")
    whole, sampling = merged(trained(run), "cpu"), Sampling(12, temperature=0.0)
    base = read_model(run, "cpu")
    found, wanted, others = (
        rollout(model, [IDS], [[0]], sampling, stop_ids=sorted(stop_ids(base.tokenizer)))
        if sampler is None
        else sampler(model, [IDS], [[0]], sampling)
        for model, sampler in ((whole, Own(run, "cpu")), (whole, None), (base, None))
    )
    assert found[0][0].token_ids == wanted[0][0].token_ids != others[0][0].token_ids


def test_what_a_server_says_of_a_prompt_is_told(tiny, tmp_path: Path, monkeypatch) -> None:
    def post(self: Served, path: str, body: dict | None = None) -> dict:
        raise ConfigError("rollout_server refused (400): the prompt is too long")

    monkeypatch.setattr(Served, "_post", post)
    with pytest.raises(ConfigError, match="the prompt is too long"):
        Served(run_of(tiny("tiny-dense"), tmp_path / "out"), "cpu")._answer({})
    monkeypatch.setattr(Served, "_post", lambda *_: {"choices": [{"text": "no ids"}]})
    with pytest.raises(ConfigError, match="without token ids and log-probabilities"):
        Served(run_of(tiny("tiny-dense"), tmp_path / "out"), "cpu")._answer({})


class Dropping(BaseHTTPRequestHandler):
    """Closes the first connections without a word."""

    def do_POST(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]
        if self.server.asked > self.server.dropped:  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("dropped", [1, 9])
def test_a_lost_connection_is_tried_again_and_then_told(
    dropped: int, tiny, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(samplers, "RETRY_S", (0.0, 0.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dropping)
    server.asked, server.dropped = 0, dropped  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    served = Served(run_of(tiny("tiny-dense"), tmp_path / "out", rollout_server=address), "cpu")
    try:
        if dropped == 1:
            assert served._post("/v1/pause") == {}
        else:
            with pytest.raises(ConfigError, match="no server answers at rollout_server"):
                served._post("/v1/pause")
        assert server.asked == min(dropped + 1, 3)  # type: ignore[attr-defined]
        server.asked = 0  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="no server answers at rollout_server"):
            served._answer({})  # which a server begun anew would answer by other weights
        assert server.asked == 1  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Refusing(BaseHTTPRequestHandler):
    """Refuses other weights, takes a pause for a while, and lets in who has the key."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told: list[tuple[str, bool]] = self.server.told  # type: ignore[attr-defined]
        folder: Path = self.server.folder  # type: ignore[attr-defined]
        told.append((self.path, folder.is_dir()))
        status = 200
        if self.headers.get("Authorization") != "Bearer abc":
            status = 401
        elif self.path in self.server.refused:  # type: ignore[attr-defined]
            status = 400
        body = b"{}" if status == 200 else f"no {self.path}".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(tmp_path: Path):
    """A server of control, with what it has been told, and where the weights lie meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.told, server.refused = [], ()  # type: ignore[attr-defined]
    server.folder = tmp_path / "out/rollout_weights"  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_draws_as_the_run_says_and_not_as_the_model_recommends(
    tiny, tmp_path: Path, monkeypatch
) -> None:
    model, jobs = trained(run := run_of(tiny("tiny-dense"), tmp_path / "out")), []
    monkeypatch.setattr(Served, "update", lambda self, model: None)
    monkeypatch.setattr(Served, "_answer", lambda self, job: jobs.append(job))
    Served(run, "cpu")(model, [IDS], [[1, 2]], Sampling(4, temperature=0.7))
    for job in jobs:
        assert job.keys() >= set(_RECOMMENDED)
        assert all(job[name] == value for name, value in NO_PENALTIES.items())
    assert len(jobs) == 2


@pytest.mark.parametrize("refused", [(), ("/v1/update_weights",), ("/v1/pause", "/v1/resume")])
def test_a_server_goes_on_and_no_weights_are_left(
    refused: tuple, refusing, tiny, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FD_API_KEY", "abc,def")
    refusing.refused = refused
    address = f"http://127.0.0.1:{refusing.server_port}"
    run = run_of(tiny("tiny-dense"), tmp_path / "out", rollout_server=address)
    model = build_model(run, "cpu")
    if refused:
        with pytest.raises(ConfigError, match=f"{refused[0]} refused .400.: no {refused[0]}"):
            Served(run, "cpu").update(model)
    else:
        Served(run, "cpu").update(model)
    assert refusing.told[0] == ("/v1/pause", True) and refusing.told[-1][0] == "/v1/resume"
    assert not refusing.folder.exists()


def test_a_server_with_keys_gets_one_of_the_environment_and_else_says_so(
    refusing, tiny, tmp_path: Path, monkeypatch
) -> None:
    address = f"http://127.0.0.1:{refusing.server_port}"
    served = Served(run_of(tiny("tiny-dense"), tmp_path / "out", rollout_server=address), "cpu")
    for name in ("FD_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"refused .401.: .* one of its keys in FD_API_KEY"):
        served._post("/v1/pause")
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    assert served._post("/v1/pause") == {}
    monkeypatch.setenv("FD_API_KEY", "another")
    with pytest.raises(ConfigError, match="401"):
        served._post("/v1/pause")
