"""The chat page in headless Chromium: before a scripted server, and before the real one."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_page import CHROMIUM, Upstream, running
from helpers_server import Server, wait_until
from starlette.testclient import TestClient

from fastdeploy.server.page import FILES, FOLDER, PATHS, POLICY

pytest.importorskip("playwright", reason="drives the browser; in the extra `dev`")
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

expect.set_options(timeout=30_000)  # ms: a failure waits for it, a success does not
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed; apt-get install chromium"
)

MARKDOWN = """# Title

A *word*, **bold**, `co*de*`, ~~gone~~, 2 * 3 * 4, snake_case_name
next line <img src=x onerror=alert(1)>

- one
- two with **bold**
  continued
  1. inner
  2. inner two

3. third

| a | b |
|:--|--:|
| 1 | `x` |

```html
<script>alert(1)</script>
- no list
```
> quoted
> - item

***both*** and [text](https://example.com/a_(b)) ![pic](https://example.com/x.png)
[bad](javascript:alert(1)) https://example.com/x?a=1. **unclosed
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Upstream, str]]:
    upstream = Upstream()
    with running(upstream.app()) as url:
        yield upstream, url


@pytest.fixture
def upstream(scripted: tuple[Upstream, str]) -> Upstream:
    vars(scripted[0]).update(vars(Upstream()))
    return scripted[0]


@pytest.fixture
def page(browser: Browser, scripted: tuple[Upstream, str], upstream: Upstream) -> Iterator[Page]:
    yield from opened(browser, scripted[1])


def opened(browser: Browser, url: str) -> Iterator[Page]:
    """The page at `url`; fails on any message of the console and on any request elsewhere."""
    context = browser.new_context(base_url=url)
    context.set_default_timeout(10_000)
    faults: list[str] = []

    def watch(route: Route, request: Request) -> None:
        if request.url.startswith(url):
            return route.continue_()
        faults.append(f"asks for {request.url}")
        return route.abort()

    context.route("**", watch)
    tab = context.new_page()
    tab.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto("/")
    yield tab
    context.close()
    # The browser itself notes each refused request; the page shows those.
    assert [f for f in faults if "Failed to load resource: the server responded" not in f] == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Page):
    return page.locator(".assistant").last


def expect_end(page: Page, count: int) -> None:
    """There are so many answers, and all have ended: only then can they be copied."""
    expect(page.locator(".assistant [data-act=answer]")).to_have_count(count)


@needs_browser
def test_an_answer_is_streamed_with_its_figures(page: Page, upstream: Upstream) -> None:
    upstream.script = [{"content": "One "}, 0.1, {"content": "two."}, 0.2, {"content": " Three."}]
    expect(page.locator("#card-name")).to_have_text("ERNIE-4.5-0.3B")
    expect(page.locator("#facts")).to_contain_text("131,072 tokens")
    ask(page, "Count <b>")
    expect(answer(page).locator(".markdown")).to_have_text("One two.")  # before the rest is there
    expect(answer(page).locator(".figures")).to_contain_text("2 tokens")
    expect(answer(page).locator(".figures")).to_have_text(
        re.compile(r"^3 tokens · [\d.]+ tok/s · first after [\d.]+ s$")
    )
    expect(page.locator(".bubble")).to_have_text("Count <b>")
    expect(page.locator("#status")).to_have_text("The answer is complete.")
    ask(page, "More")
    expect_end(page, 2)
    roles = [message["role"] for message in upstream.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert upstream.bodies[-1]["messages"][1]["content"] == "One two. Three."


@needs_browser
def test_stop_ends_the_stream_and_keeps_what_was_written(page: Page, upstream: Upstream) -> None:
    upstream.script = [{"content": "Begun"}, 90.0, {"content": "never"}]
    for stop in (lambda: page.keyboard.press("Escape"), page.get_by_label("Stop the answer").click):
        ask(page, "Go on")
        expect(answer(page).locator(".markdown")).to_have_text("Begun")
        stop()
        expect(answer(page).locator(".note")).to_have_text("Stopped.")
        expect(page.get_by_label("Send", exact=True)).to_be_visible()
    expect_end(page, 2)
    wait_until(lambda: upstream.num_left == 2)  # the server was told


@needs_browser
def test_regenerate_and_edit_replace_the_end(page: Page, upstream: Upstream) -> None:
    ask(page, "First")
    expect(answer(page).locator(".markdown")).to_have_text("Hello.")
    upstream.script = [{"content": "Better."}]
    page.get_by_role("button", name="Regenerate").click()
    expect(answer(page).locator(".markdown")).to_have_text("Better.")
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit").click()
    box = page.get_by_label("Edit your message")
    expect(box).to_have_value("First")
    box.fill("Second")
    box.press("Enter")
    expect(page.locator(".bubble")).to_have_text(["Second"])
    expect(page.locator(".assistant")).to_have_count(1)
    sent = [[m["content"] for m in body["messages"]] for body in upstream.bodies]
    assert sent == [["First"], ["First"], ["Second"]]


DROP = """([data, how]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
    const target = document.getElementById("input");
    const options = { bubbles: true, cancelable: true };
    if (how === "paste") {
        target.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    } else {
        target.dispatchEvent(new DragEvent("dragover", { ...options, dataTransfer: transfer }));
        target.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: transfer }));
    }
}"""


def a_png(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


@needs_browser
def test_pictures_are_added_by_button_drop_and_paste(page: Page, upstream: Upstream) -> None:
    contents = {how: a_png(color) for how, color in zip(("button", "drop", "paste"), COLORS)}
    file = {"name": "a.png", "mimeType": "image/png", "buffer": contents["button"]}
    page.locator("#files").set_input_files([file])  # what the button opens
    expect(page.locator("#tray img")).to_have_count(1)
    for number, how in enumerate(("drop", "paste"), 2):
        page.evaluate(DROP, [base64.b64encode(contents[how]).decode(), how])
        expect(page.locator("#tray img")).to_have_count(number)
    page.get_by_label("Remove picture 1").click()
    expect(page.locator("#tray img")).to_have_count(2)
    ask(page, "Compare")
    expect_end(page, 1)
    expect(page.locator("#tray")).to_be_hidden()
    expect(page.locator(".user .pictures img")).to_have_count(2)
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth)")
    wanted = [
        {"type": "image_url", "image_url": {"url": as_url(contents[how])}}
        for how in ("drop", "paste")
    ]
    wanted += [{"type": "text", "text": "Compare"}]
    assert upstream.bodies[-1]["messages"] == [{"role": "user", "content": wanted}]
    page.reload()
    expect(page.locator(".user .pictures img")).to_have_count(2)
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("Describe")
    page.keyboard.press("Enter")
    expect_end(page, 1)
    wanted[-1] = {"type": "text", "text": "Describe"}
    assert upstream.bodies[-1]["messages"] == [{"role": "user", "content": wanted}]


COLORS = ("red", "green", "blue")


def as_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@needs_browser
def test_a_picture_alone_is_a_message_and_a_large_one_is_made_smaller(
    page: Page, upstream: Upstream
) -> None:
    file = {"name": "a.png", "mimeType": "image/png", "buffer": a_png("red", (4000, 2000))}
    page.locator("#files").set_input_files([file])
    expect(page.locator("#tray img")).to_have_count(1)
    page.get_by_label("Send", exact=True).click()
    expect_end(page, 1)
    (part,) = upstream.bodies[-1]["messages"][0]["content"]
    head, content = part["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    width, height = Image.open(io.BytesIO(base64.b64decode(content))).size
    assert 4_700_000 < width * height <= 4_842_768 and abs(width / height - 2) < 0.01


@needs_browser
def test_what_is_no_picture_and_a_model_of_text_are_told(page: Page, upstream: Upstream) -> None:
    expect(page.get_by_label("Add pictures")).to_be_visible()
    text = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.locator("#files").set_input_files([text])
    expect(page.get_by_role("alert")).to_contain_text("a.txt is no picture")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    upstream.reads = ["text"]
    page.reload()
    expect(page.locator("#facts")).to_contain_text("tokens")
    expect(page.get_by_label("Add pictures")).to_be_hidden()
    page.evaluate(DROP, [base64.b64encode(a_png("red")).decode(), "drop"])
    expect(page.get_by_role("alert")).to_contain_text("This model reads text only.")


@needs_browser
def test_pictures_beyond_the_browsers_storage_are_told_after_a_reload(page: Page) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    sent = {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    for number in range(1, 4):
        page.locator("#files").set_input_files([sent])
        expect(page.locator("#tray img")).to_have_count(number)
    ask(page, "Look")
    expect_end(page, 1)
    expect(page.locator(".user .pictures img")).to_have_count(3)
    page.reload()
    expect(page.locator(".user .note")).to_contain_text("The pictures of this message are gone")


@needs_browser
def test_settings_and_conversation_outlive_a_reload(page: Page, upstream: Upstream) -> None:
    page.get_by_role("button", name="Settings").click()
    values = {"system": "Be brief.", "temperature": "0.5", "top_p": "", "max_tokens": "64"}
    for name, value in {**values, "seed": "7"}.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.get_by_role("button", name="Done").click()
    upstream.script = [{"reasoning_content": "Hm."}, {"content": "Kept."}]
    ask(page, "Hi")
    expect(answer(page).locator("> .markdown")).to_have_text("Kept.")
    page.reload()
    expect(answer(page).locator("> .markdown")).to_have_text("Kept.")
    expect(answer(page).locator("summary")).to_contain_text("Thought for")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings [name=temperature]")).to_have_value("0.5")
    page.keyboard.press("Escape")
    ask(page, "Again")
    expect_end(page, 2)
    body = upstream.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    found = {name: body.get(name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert found == {"temperature": 0.5, "top_p": None, "max_tokens": 64, "seed": 7}
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


@needs_browser
def test_thoughts_and_tool_calls_stand_apart(page: Page, upstream: Upstream) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": ' "Paris"}'}}
    upstream.script = [{"reasoning_content": "Let me see"}, 0.5, {"content": "Asking."}]
    upstream.script += [{"tool_calls": [call]}, {"tool_calls": [rest]}]
    ask(page, "Weather?")
    expect(answer(page).locator(".thought .markdown")).to_be_visible()
    expect(answer(page).locator("> .markdown")).to_have_text("Asking.")
    expect(answer(page).locator(".thought .markdown")).to_be_hidden()
    answer(page).locator("summary").click()
    expect(answer(page).locator(".thought .markdown")).to_have_text("Let me see")
    expect(answer(page).locator(".call figcaption")).to_have_text("Tool call get_weather")
    expect(answer(page).locator(".call pre")).to_have_text('{ "city": "Paris" }')


@needs_browser
@pytest.mark.parametrize(
    ("refusal", "script", "said"),
    [
        ((429, "64 requests wait"), [], "The server is busy: 64 requests wait. Try again in 3 s."),
        ((400, "temperature=9 is"), [], "The server refused this (400): temperature=9 is"),
        ((503, "loading"), [], "The server is not ready: loading."),
        (None, [{"content": "Half"}, "error"], "The server has failed: the engine has stopped."),
        (None, [{"content": "Half"}, "break"], "The connection was lost in the middle"),
    ],
)
def test_an_error_is_shown_and_can_be_tried_again(
    page: Page, upstream: Upstream, refusal: tuple[int, str] | None, script: list, said: str
) -> None:
    upstream.refusal, upstream.script = refusal, script
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text(said)
    if script:
        expect(answer(page).locator("> .markdown")).to_have_text("Half")
    upstream.refusal, upstream.script = None, [{"content": "Now."}]
    page.get_by_role("button", name="Try again").click()
    expect(answer(page).locator("> .markdown")).to_have_text("Now.")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(2)


@needs_browser
def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, upstream: Upstream) -> None:
    upstream.key = "sesame"
    page.reload()
    page.locator("#key").fill("wrong")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#key-text")).to_contain_text("was not accepted")
    page.locator("#key").fill("sesame")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#card-name")).to_have_text("ERNIE-4.5-0.3B")
    page.reload()
    ask(page, "Hi")
    expect(answer(page).locator("> .markdown")).to_have_text("Hello.")
    kept = page.evaluate("[JSON.stringify(localStorage), sessionStorage['fastdeploy.key']]")
    assert "sesame" not in kept[0] and kept[1] == "sesame"


@needs_browser
def test_a_server_that_is_gone_is_named_as_such(browser: Browser) -> None:
    tab = browser.new_context().new_page()
    with running(Upstream().app()) as url:
        tab.goto(url)
        expect(tab.locator("#facts")).to_contain_text("tokens")
    ask(tab, "Hi")
    expect(tab.get_by_role("alert")).to_contain_text("The server does not answer")
    tab.context.close()


@needs_browser
def test_markdown_streamed_in_any_cut_looks_like_the_whole(page: Page) -> None:
    script = """async ([text, size]) => {
        const { Markdown } = await import("/web/markdown.js");
        const root = document.createElement("div");
        const markdown = new Markdown(root);
        for (let i = 0; i < text.length; i += size) markdown.append(text.slice(i, i + size));
        root.normalize();
        return [root.innerHTML, root.querySelectorAll("img, script").length];
    }"""
    whole, num_live = page.evaluate(script, [MARKDOWN, len(MARKDOWN)])
    assert num_live == 0
    for size in (1, 2, 3, 5, 7, 11):
        assert page.evaluate(script, [MARKDOWN, size])[0] == whole, f"cut every {size} characters"
    for part in (
        "<h3>Title</h3>",
        "<em>word</em>, <strong>bold</strong>, <code>co*de*</code>, <del>gone</del>, 2 * 3 * 4",
        "<ul><li><p>one</p></li><li><p>two with <strong>bold</strong><br>continued</p><ol><li>",
        '<ol start="3">',
        '<td class="right"><code>x</code></td>',
        "&lt;script&gt;alert(1)&lt;/script&gt;\n- no list",
        "<blockquote><p>quoted</p><ul><li><p>item</p></li></ul></blockquote>",
        '<a href="https://example.com/a_(b)" target="_blank" rel="noopener noreferrer nofollow">',
        ">pic</a>",
        "[bad](javascript:alert(1))",
        ">https://example.com/x?a=1</a>. **unclosed",
    ):
        assert part in whole, f"{part}\nis not in\n{whole}"


@needs_browser
def test_hostile_markdown_takes_no_time(page: Page) -> None:
    script = """async (text) => {
        const { Markdown } = await import("/web/markdown.js");
        new Markdown(document.createElement("div")).append(text);
        return true;
    }"""
    page.set_default_timeout(10_000)
    for piece in (
        "*",
        "_",
        "`a",
        "[",
        "**a ",
        "> ",
        "- ",
        "# ",
        "|-",
        "![a](",
        "http://",
        " \t",
        "~~",
    ):
        assert page.evaluate(script, piece * 20_000), piece


@needs_browser
def test_dark_mode_follows_the_system_until_switched(page: Page) -> None:
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.get_by_label("Switch between light and dark").click()
    assert ground() == light
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert ground() == light


@needs_browser
def test_nothing_is_cut_off_on_a_phone(page: Page, upstream: Upstream) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    upstream.names = [f"ERNIE-4.5-21B-A3B-Thinking-{kind}" for kind in ("wint4-ours", "adapter")]
    page.reload()
    upstream.script = [{"content": "```\n" + "x" * 300 + "\n```\n" + "y" * 300}]
    ask(page, "z" * 300)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth")
    inner = page.evaluate("document.getElementById('scroller').scrollWidth")
    assert max(width, inner) <= 360


@needs_browser
def test_the_real_server_answers_its_page(browser: Browser, server: Server) -> None:
    for tab in opened(browser, server.url.removesuffix("/v1")):
        expect(tab.locator("#facts")).to_contain_text("256 tokens")
        tab.get_by_role("button", name="Settings").click()
        tab.locator("#settings [name=max_tokens]").fill("12")
        tab.get_by_role("button", name="Done").click()
        ask(tab, "Hello!")
        expect(answer(tab).locator(".note")).to_contain_text("Cut off")
        expect(answer(tab).locator(".figures")).to_contain_text("12 tokens")
        ask(tab, "Hello! " * 300)
        expect(tab.get_by_role("alert")).to_contain_text("The server refused this (400)")


def test_the_files_are_small_guarded_and_complete() -> None:
    client = TestClient(Upstream().app())
    total = 0
    for path in PATHS:
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == POLICY
        assert "unsafe" not in POLICY
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        total += len(answer.content)
    assert total < 56 * 1024, f"the page has grown to {total} bytes"
    assert {name for name, _ in FILES.values()} == {path.name for path in FOLDER.iterdir()}
    html = (FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"<script>|<style|style=|\son\w+=|https?://", html)
