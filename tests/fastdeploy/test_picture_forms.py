"""Pictures in `/v1/responses` and `/v1/messages`: the chat's answers, kept, counted and refused."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_lora
from helpers_server import app_client
from openai import OpenAI
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter
from starlette.testclient import TestClient

import ernie
from erniekit.lora import LoRA
from fastdeploy.config import EngineConfig, ServerConfig
from tests.helpers_vision import data_url, png, serving, vl_model_folder

RED, BLUE = png("red"), png("blue", (90, 60))
ITEMS: TypeAdapter[Any] = TypeAdapter(list[ResponseItem])
LENGTH = 10
# As the template of the Thinking model, with a place for what tools say.
TEMPLATE = """{% for m in messages %}{{ m.role }}:
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
{% if p.type == 'image' %}<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>{% else %}{{ p.text }}
{% endif %}{% endfor %}{% endif %}
{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}
{% endfor %}assistant:"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl_model_folder(tmp_path_factory.mktemp("models") / "tiny-vl")


def engine_config(folder: Path, **settings: Any) -> EngineConfig:
    settings = {"max_model_len": 256, "block_size": 8, "chat_template": TEMPLATE} | settings
    return EngineConfig(model=str(folder), dtype="float32", **settings)


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[TestClient]:
    config = ServerConfig(tool_call_parser="ernie-45-vl-thinking")
    with app_client(engine_config(folder), config) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="one", http_client=http, max_retries=0)


# A picture in each form.


def chat_image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def input_image(content: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(content), **more}


def image_block(content: bytes) -> dict[str, Any]:
    data = base64.b64encode(content).decode()
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


def chat(http: TestClient, messages: list[dict[str, Any]], **more: Any) -> tuple[str, int]:
    """What the chat says, and the tokens of its prompt."""
    body = {"messages": messages, "temperature": 0, "max_tokens": LENGTH}
    answer = http.post("/v1/chat/completions", json=body | more).json()
    message = answer["choices"][0]["message"]
    return message["content"], answer["usage"]["prompt_tokens"]


def respond(client: OpenAI, **fields: Any) -> Any:
    more = {"model": "m", "temperature": 0, "max_output_tokens": LENGTH}
    return client.responses.create(**more | fields)


def message(http: TestClient, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": LENGTH, "temperature": 0}
    return http.post("/v1/messages", json=body | fields)


def said(content: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


TEXT = {"type": "text", "text": "What is this?"}
INPUT_TEXT = {"type": "input_text", "text": "What is this?"}


def test_a_response_about_pictures_is_what_the_chat_says(http: TestClient, client: OpenAI) -> None:
    text, num_prompt = chat(http, said([chat_image(RED), TEXT, chat_image(BLUE)]))
    asked = said([input_image(RED, detail="low"), INPUT_TEXT, input_image(BLUE)])
    whole = respond(client, input=asked)
    assert whole.output_text == text
    usage = whole.usage
    assert usage.input_tokens == num_prompt
    assert usage.input_tokens_details.image_tokens == 12
    events = list(respond(client, input=asked, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text
    other = respond(client, input=said([input_image(BLUE), INPUT_TEXT, input_image(RED)]))
    assert other.output_text != text, "pictures change nothing"
    said_of = {
        name: float(value)
        for line in http.get("/metrics").text.splitlines()
        if line.startswith("fastdeploy:mm_cache_")
        for name, value in [line.removeprefix("fastdeploy:mm_cache_").split()]
    }
    assert said_of["hits_total"] > 0 < said_of["bytes"], said_of
    assert said_of["queries_total"] >= said_of["hits_total"] + 2, said_of


def test_a_response_goes_on_about_the_pictures_before(http: TestClient, client: OpenAI) -> None:
    first = respond(client, input=said([input_image(RED), INPUT_TEXT]))
    second = respond(client, input="And now?", previous_response_id=first.id)
    third = respond(client, input=said([input_image(BLUE)]), previous_response_id=second.id)
    turns = [
        *said([chat_image(RED), TEXT]),
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]
    assert (second.output_text, second.usage.input_tokens) == chat(http, turns)
    turns += [{"role": "assistant", "content": second.output_text}, *said([chat_image(BLUE)])]
    assert (third.output_text, third.usage.input_tokens) == chat(http, turns)
    listed = client.responses.input_items.list(third.id, order="asc", limit=20)
    items = ITEMS.validate_python([item.to_dict() for item in listed.data])
    pictures = [p for item in items for p in item.content if p.type == "input_image"]
    assert [(p.image_url, p.detail) for p in pictures] == [
        (data_url(RED), "auto"),
        (data_url(BLUE), "auto"),
    ]


def test_a_background_response_about_a_picture_is_followed_and_cancelled(
    http: TestClient, client: OpenAI
) -> None:
    asked = said([input_image(RED), INPUT_TEXT])
    text, _ = chat(http, said([chat_image(RED), TEXT]))
    made = respond(client, input=asked, background=True)
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].response.output_text == text
    endless = {"max_output_tokens": 200, "extra_body": {"ignore_eos": True}}
    running = respond(client, input=asked, background=True, **endless)
    assert client.responses.cancel(running.id).status == "cancelled"
    assert chat(http, said([chat_image(RED), TEXT]))[0] == text, "the engine does not go on"


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_about_pictures_is_what_the_chat_says(http: TestClient, stream: bool) -> None:
    text, num_prompt = chat(http, said([chat_image(RED), TEXT, chat_image(BLUE)]))
    url = {"type": "image", "source": {"type": "url", "url": data_url(BLUE)}}
    asked = said([image_block(RED), TEXT, url])
    answer = message(http, messages=asked, stream=stream)
    if stream:
        lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert events[-1]["type"] == "message_stop"
        assert "".join(event.get("delta", {}).get("text", "") for event in events) == text
        return
    usage = answer.json()["usage"]
    assert answer.json()["content"] == [{"type": "text", "text": text}]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt
    counted = http.post("/v1/messages/count_tokens", json={"messages": asked})
    assert counted.json() == {"input_tokens": num_prompt}


def test_texts_beside_pictures_are_lines_of_one(http: TestClient, client: OpenAI) -> None:
    lines = said([{"type": "text", "text": "One\nTwo"}, chat_image(RED)])
    wanted = chat(http, lines)
    texts = [{"type": "input_text", "text": text} for text in ("One", "Two")]
    got = respond(client, input=said([*texts, input_image(RED)]))
    assert (got.output_text, got.usage.input_tokens) == wanted
    blocks = [{"type": "text", "text": text} for text in ("One", "Two")]
    answer = message(http, messages=said([*blocks, image_block(RED)])).json()
    assert answer["content"][0]["text"] == wanted[0]


@pytest.mark.parametrize("fails", [False, True])
def test_results_of_tools_hold_pictures(http: TestClient, client: OpenAI, fails: bool) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    shown = "Error: Seen:" if fails else "Seen:"
    seen = [{"type": "text", "text": shown}, chat_image(RED)]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": seen},
    ]
    wanted = chat(http, turns)
    use = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": fails}
    result["content"] = [{"type": "text", "text": "Seen:"}, image_block(RED)]
    blocks = [turns[0], {"role": "assistant", "content": [use]}, *said([result])]
    answer = message(http, messages=blocks).json()
    assert answer["content"][0]["text"] == wanted[0]
    assert sum(answer["usage"][f"{kind}_input_tokens" if kind else "input_tokens"] for kind in (
        "", "cache_read")) == wanted[1]  # fmt: skip
    items: list[Any] = [
        turns[0],
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a"},
    ]
    items[-1]["output"] = [{"type": "input_text", "text": shown}, input_image(RED)]
    got = respond(client, input=items)
    assert (got.output_text, got.usage.input_tokens) == wanted


def test_truncation_leaves_out_the_oldest_pictures(folder: Path) -> None:
    config = ServerConfig(allowed_media_networks=["127.0.0.0/8"], limit_mm_per_prompt={"image": 5})
    with (
        app_client(engine_config(folder, max_model_len=128), config) as http,
        serving(RED) as (address, paths),
    ):
        turns: list[dict[str, Any]] = []
        for i in range(9):
            url = f"http://{address}/{i}"
            turns += said([{"type": "input_image", "image_url": url}, INPUT_TEXT])
            turns += [{"role": "assistant", "content": "Red."}]
        turns += [{"role": "user", "content": "Are you sure?"}]
        body = {"input": turns, "max_output_tokens": 8, "temperature": 0}
        refused = http.post("/v1/responses", json=body).json()["error"]
        assert (refused["param"], paths) == ("input", [])
        assert "9 parts of image; the limit is 5" in refused["message"]
        got = http.post("/v1/responses", json=body | {"truncation": "auto"}).json()
        assert len(paths) == len(set(paths)) <= 5, "a picture is fetched more than once"
        lengths = []
        for dropped in range(9, -1, -1):
            rest = [
                {"role": m["role"], "content": [TEXT, chat_image(RED)][:: -1]}
                if isinstance(m["content"], list) and m["role"] == "user"
                else m
                for m in turns[2 * dropped :]
            ]  # fmt: skip
            answer = http.post("/tokenize", json={"messages": rest}).json()
            lengths.append(answer.get("count", 10**6))
        assert got["usage"]["input_tokens"] == max(n for n in lengths if n <= 120)
        turns[16] = said([INPUT_TEXT, input_image(b"none")])[0]
        error = http.post("/v1/responses", json=body | {"truncation": "auto"}).json()["error"]
        assert error["message"].startswith("input[16].content[1]: the picture"), error


def test_an_adapter_answers_about_pictures_as_the_merged_model(
    folder: Path, tmp_path: Path
) -> None:
    """All three forms, by the adapter's name."""
    base, pair = ernie.load(folder, dtype=torch.float32), LoRA(4, 16.0)
    wrapped = helpers_lora.trained(base, pair, 3)
    helpers_lora.save(wrapped, pair, tmp_path / "poet")
    shutil.copytree(folder, tmp_path / "merged")
    ernie.save(helpers_lora.merged(wrapped), tmp_path / "merged")
    asked = said([chat_image(RED), TEXT])
    with app_client(engine_config(tmp_path / "merged")) as http:
        text, _ = chat(http, asked)
    config = ServerConfig(lora_modules=[f"poet={tmp_path / 'poet'}"])
    with app_client(engine_config(folder, enable_lora=True), config) as http:
        assert chat(http, asked, model="poet")[0] == text != chat(http, asked)[0]
        answer = message(http, messages=said([image_block(RED), TEXT]), model="poet").json()
        assert answer["content"][0]["text"] == text
        body = {"input": said([input_image(RED), INPUT_TEXT]), "model": "poet", "temperature": 0}
        answer = http.post("/v1/responses", json=body | {"max_output_tokens": LENGTH}).json()
        assert answer["output"][0]["content"][0]["text"] == text


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a file kept": (
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image", "source": {"type": "file", "file_id": "file-1"}},
        "no files",
    ),
    "no source": ({"type": "input_image"}, {"type": "image"}, "has "),
    "a source of another type": (
        {"type": "input_image", "image_url": {"url": "x"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": 5}},
        "has ",
    ),
    "a setting": (
        input_image(RED, detail="best"),
        {"type": "image", "source": {"type": "base64", "media_type": "text/html", "data": ""}},
        "it takes one of",
    ),
    "no picture": (input_image(b"none"), image_block(b"none"), "the picture"),
    "a file": (
        {"type": "input_image", "image_url": "file:///etc/passwd"},
        {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}},
        "",
    ),
    "an address within": (
        {"type": "input_image", "image_url": "http://127.0.0.1:1/x"},
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x"}},
        "no public address",
    ),
    "another type": ({"type": "input_file"}, {"type": "document"}, "is of type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_by_its_place(http: TestClient, name: str) -> None:
    part, block, why = REFUSED[name]
    begin = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    responses = {"input": [*begin, *said([INPUT_TEXT, part])], "instructions": "Be brief"}
    messages = {"messages": [*begin, *said([TEXT, block])], "system": "Be brief"}
    for path, sent, place in (
        ("/v1/responses", responses, "input[2].content[1]"),
        ("/v1/messages", {**messages, "max_tokens": 5}, "messages[2].content[1]"),
        ("/v1/messages/count_tokens", messages, "messages[2].content[1]"),
    ):
        answer = http.post(path, json=sent)
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert error["param"] == place.partition("[")[0]
        assert error["message"].startswith(place) and why in error["message"], error
        assert "\n" not in error["message"]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_pictures_are_sent_by_users_and_tools_alone(http: TestClient, role: str) -> None:
    items = [{"role": role, "content": [input_image(RED)]}, {"role": "user", "content": "x"}]
    error = http.post("/v1/responses", json={"input": items}).json()["error"]
    assert "input[0].content[0] is of type 'input_image'; text is read here" in error["message"]
    body: dict[str, Any] = {"messages": said([TEXT]), "max_tokens": 5}
    if role == "system":
        body["system"] = [image_block(RED)]
    else:
        body["messages"].append({"role": role, "content": [image_block(RED)]})
    error = http.post("/v1/messages", json=body).json()["error"]
    assert "content[0] is of type 'image'" in error["message"] or "system[0]" in error["message"]


def test_more_pictures_than_the_limit_are_refused_in_the_forms_words(http: TestClient) -> None:
    for path, field, part in (
        ("/v1/responses", "input", input_image(RED)),
        ("/v1/messages", "messages", image_block(RED)),
    ):
        body = {field: said([part] * 17), "max_tokens": 5}
        body |= {"max_output_tokens": body.pop("max_tokens")} if field == "input" else {}
        error = http.post(path, json=body).json()["error"]
        assert error["param"] == field
        assert "17 parts of image; the limit is 16" in error["message"]
