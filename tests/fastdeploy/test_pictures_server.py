"""Pictures through the server: the plain generator's tokens, its limits, and what URLs reach."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_server import app_client, start_server, stop_server
from openai import OpenAI
from starlette.testclient import TestClient

import ernie
from ernie.chat import ChatTemplate
from ernie.generate import generate
from ernie.vision.prompt import Processor
from fastdeploy.config import EngineConfig, ServerConfig
from tests.helpers_vision import data_url, grey_clip, png, serving, vl_model_folder

RED, BLUE = png("red"), png("blue", (90, 60))
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl_model_folder(tmp_path_factory.mktemp("models") / "tiny-vl")


def engine_config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", max_model_len=256, block_size=8)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with app_client(engine_config(folder), ServerConfig()) as client:
        yield client


def image(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **options}}


def asked(*parts: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def body(*parts: str | Mapping[str, Any], **options: Any) -> dict[str, Any]:
    settings = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    return {"messages": asked(*parts), **settings, **options}


def expected(folder: Path, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the plain generator's answer."""
    model = ernie.load(folder, dtype=torch.float32)
    tokenizer, template = ernie.Tokenizer.from_folder(folder), ChatTemplate.for_folder(folder)
    inputs = Processor.from_folder(folder).inputs(template, tokenizer, messages)
    pictures = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw}
    return inputs.token_ids, list(generate(model, inputs.token_ids, max_tokens=12, **pictures))


PROMPTS = {
    "an image": ["What is this?", image(data_url(RED))],
    "two images": [image(data_url(RED)), "and", image(data_url(BLUE)), "differ?"],
    "a clip": ["See", {"type": "video_url", "video_url": {"url": data_url(
        grey_clip(range(0, 240, 12), size=(56, 56)), "video/mp4"), "max_frames": 4,
        "min_frames": 2, "min_pixels": 3136, "max_pixels": 3136}}],
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_are_the_plain_generators(client: TestClient, folder: Path, name: str) -> None:
    sent = body(*PROMPTS[name])
    prompt, tokens = expected(folder, sent["messages"])
    answer = client.post(CHAT, json=sent).json()
    message = answer["choices"][0]["message"]
    assert message["prompt_token_ids"] == prompt
    assert message["completion_token_ids"] == tokens
    counted = sum(token == prompt_placeholder(folder) for token in prompt)
    usage = answer["usage"]
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] + details["video_tokens"] == counted > 0
    assert usage["prompt_tokens"] == len(prompt)
    assert (details["video_tokens"] > 0) == (name == "a clip")


def prompt_placeholder(folder: Path) -> int | None:
    return ernie.Tokenizer.from_folder(folder).id_of("<|IMAGE_PLACEHOLDER|>")


def test_other_pixels_give_another_answer_although_the_tokens_are_the_same(
    client: TestClient,
) -> None:
    answers = [
        client.post(CHAT, json=body("What?", image(data_url(png(color))))).json()
        for color in ("red", "green")
    ]
    first, second = (answer["choices"][0]["message"] for answer in answers)
    assert first["prompt_token_ids"] == second["prompt_token_ids"]
    assert first["completion_token_ids"] != second["completion_token_ids"]


def test_the_openai_client_streams_an_answer_about_a_picture(folder: Path) -> None:
    server = start_server(folder, "--reasoning-parser", "ernie-45-vl")
    try:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        settings: dict[str, Any] = {"model": "m", "max_tokens": 12, "temperature": 0}
        settings["messages"] = asked("What is this?", image(data_url(RED), detail="high"))
        whole = client.chat.completions.create(**settings)
        pieces = client.chat.completions.create(**settings, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert whole.usage is not None and whole.usage.completion_tokens > 0
    finally:
        assert stop_server(server) == 0


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no picture": ([image(data_url(b"no picture"))], {}, "messages[0].content[0]: the picture"),
    "a file": ([image("file:///etc/passwd")], {}, "messages[0].content[0]"),
    "a path": ([{"type": "image", "image": "/etc/passwd"}], {}, "messages[0].content[0]"),
    "no URL": ([{"type": "image_url", "image_url": 5}], {}, "holds int"),
    "ftp": ([image("ftp://example.org/a.png")], {}, "has a scheme that is not read"),
    "17 images": ([image("https://example.org/a.png")] * 17, {}, "the limit is 16"),
    "an option": ([image(data_url(RED), sharpness=3)], {}, "'sharpness' is not a property"),
    "more pixels": (
        [image(data_url(RED))],
        {"mm_processor_kwargs": {"image_max_pixels": 10**8}},
        "image_max_pixels=100000000 is above",
    ),
    "too long": ([image(data_url(png("red", (900, 900))))], {}, "max_model_len=256"),
    "seed of templates": (
        [image(data_url(RED))], {"chat_template_kwargs": {"seed": 1}}, "chat_template_kwargs sets"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence(client: TestClient, name: str) -> None:
    parts, options, why = REFUSED[name]
    answer = client.post(CHAT, json=body("Look", *reversed(parts), **options))
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert why.replace("content[0]", "content[1]") in error["message"], error
    assert "\n" not in error["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_no_url_reaches_the_network_behind_the_server(
    client: TestClient, host: str, kind: str
) -> None:
    with serving(RED) as (address, paths):
        url = f"http://{host}:{address.split(':')[1]}/secret"
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        answer = client.post(CHAT, json=body(part))
        assert answer.status_code == 400
        assert "127.0.0.1" not in answer.json()["error"]["message"].replace(host, "")
        assert paths == [], f"{host} was asked for {paths}"


def test_what_the_flags_open_is_read_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes(RED)
    (tmp_path / "out.png").write_bytes(RED)
    config = ServerConfig(
        allowed_local_media_path=str(tmp_path / "in"),
        allowed_media_networks=["127.0.0.0/8"],
        limit_mm_per_prompt={"image": 1, "video": 0},
        mm_processor_kwargs={"image_max_pixels": 28 * 28 * 6},
    )
    with app_client(engine_config(folder), config) as client, serving(RED) as (address, paths):
        wanted = client.post(CHAT, json=body(image(data_url(RED)))).json()["choices"]
        for url in (f"file://{tmp_path}/in/red.png", f"http://{address}/red.png"):
            answer = client.post(CHAT, json=body(image(url)))
            assert answer.json()["choices"] == wanted, answer.json()
        assert paths == ["/red.png"]
        for url in (f"file://{tmp_path}/out.png", f"file://{tmp_path}/in/../out.png"):
            assert client.post(CHAT, json=body(image(url))).status_code == 400
        two = client.post(CHAT, json=body(image(data_url(RED)), image(data_url(RED))))
        assert "the limit is 1" in two.json()["error"]["message"]
        clip = {"type": "video_url", "video_url": {"url": "data:,"}}
        assert "the limit is 0" in client.post(CHAT, json=body(clip)).json()["error"]["message"]


def test_a_slow_fetch_holds_no_other_request(folder: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begun.set()
            go_on.wait(30)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RED)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = ServerConfig(allowed_media_networks=["127.0.0.0/8"])
    with app_client(engine_config(folder), config) as client:
        answers: list[int] = []
        url = f"http://127.0.0.1:{server.server_port}/"
        sent = body(image(url))
        ask = threading.Thread(
            target=lambda: answers.append(client.post(CHAT, json=sent).status_code)
        )
        ask.start()
        assert begun.wait(30)
        assert client.post(CHAT, json=body("Hello")).status_code == 200
        assert answers == [], "the first one waits for its picture"
        go_on.set()
        ask.join()
        assert answers == [200]
    server.shutdown()


def test_a_model_of_text_refuses_pictures(tmp_path: Path) -> None:
    from helpers_tokenizer import random_model_folder

    with app_client(engine_config(random_model_folder(tmp_path / "text"))) as client:
        answer = client.post(CHAT, json=body("Look", image(data_url(RED))))
        assert answer.status_code == 400
        assert "this model reads parts of type 'text'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/render", "/tokenize"])
def test_the_prompt_of_a_chat_has_its_pictures(client: TestClient, folder: Path, path: str) -> None:
    messages = asked("What is this?", image(data_url(RED)))
    answer = client.post(path, json={"messages": messages}).json()
    assert answer["tokens"] == expected(folder, messages)[0]


def test_no_vectors_are_made_of_pictures(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"messages": asked(image(data_url(RED)))})
    assert answer.status_code == 400
    assert "of which no vectors are made" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"limit_mm_per_prompt": {"audio": 1}},
        {"limit_mm_per_prompt": {"image": -1}},
        {"limit_mm_per_prompt": {"image": True}},
        {"media_fetch_timeout": 0.0},
        {"allowed_local_media_path": "/no/such/folder"},
        {"allowed_media_networks": ["10.0.0.0/99"]},
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ernie.settings.ConfigError):
        ServerConfig(**options)
