"""The chat page, in a browser, against a server that answers what a test decides."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
playwright_api = pytest.importorskip("playwright.sync_api")

from chat_server import LOADING, QUEUE_FULL, ChatServer, serving  # noqa: E402

Page = Any
expect = playwright_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
HOSTILE = """\
<script>window.hacked = 1</script> <img src="http://beacon.test/a" onerror="window.hacked = 1">
[a](javascript:window.hacked=1) [b](data:text/html,<script>window.hacked=1</script>)
[c](JaVaScRiPt:1)
[d](\tjavascript:window.hacked=1) [e](vbscript:1) [f](//beacon.test/x) [g](/v1/models)
[h](file:///etc/passwd)
![i](http://beacon.test/pixel.png) ![j](javascript:1) <http://beacon.test/k>
http://beacon.test/l"onclick="x

<style>body { display: none }</style><iframe src="http://beacon.test/m"></iframe>
<base href="http://beacon.test/">

[n](https://good.test/" onmouseover="window.hacked=1) [o](https://good.test/o)
[p](mailto:a@good.test)

```"><script>window.hacked=1</script>
</code></pre><script>window.hacked = 1</script>
```

| <img src=x onerror=window.hacked=1> | b |
|---|---|
| <svg onload=window.hacked=1> | [q](javascript:1) |
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(ChatServer()) as started:
        yield started


@pytest.fixture
def visit(browser: Any, server: ChatServer) -> Iterator[Callable[..., Page]]:
    """Opens the page, after `script`; in the end, nothing may have left the origin, met the policy
    or failed."""
    contexts, faults = [], []

    def open_page(script: str = "", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda said: faults.append(said.text) if said.type != "log" else None)
        page.on("request", lambda asked: faults.append(asked.url) if away(asked.url) else None)
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.blockedURI))"
        )
        page.add_init_script(script)
        page.goto(server.address)
        return page

    def away(url: str) -> bool:
        return not url.startswith((server.address + "/", "data:", "blob:" + server.address))

    yield open_page
    # What the browser itself notes of an answer such as 503 is no fault of the page.
    expected = "Failed to load resource: the server responded with a status of"
    assert [fault for fault in faults if not fault.startswith(expected)] == []
    for context in contexts:
        context.close()


def ask(page: Page, text: str = "Hello", *, wait: bool = True) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    if wait:
        expect(page.locator("body:not(.busy)")).to_be_attached(timeout=30000)


def last_answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def body_text(page: Page) -> Any:
    return last_answer(page).locator(":scope > .markdown")


def connected(page: Page) -> Page:
    expect(page.locator("#model")).to_have_text("Qwen3-32B")
    return page


def test_the_page_claims_exactness_of_an_exact_server_only(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    expect(connected(visit()).locator("#claim")).to_have_text(
        "Every answer is exactly the full model’s."
    )
    server.verify = "lossy"
    page = connected(visit())
    expect(page.locator("#claim")).to_have_text("Answers may differ from the full model’s.")
    expect(page.locator("#resources")).to_contain_text("Lossy")
    server.verify = None  # it does not say
    page = connected(visit())
    expect(page.locator("#resources")).to_contain_text("Context")
    expect(page.locator("#claim")).to_have_text("")
    expect(page.locator("#resources")).not_to_contain_text("Lossy")


def test_an_answer_comes_piece_by_piece_and_ends_with_its_figures(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer, server.reasoning, server.pause_seconds = "One two **three**.", "Hmm.", 1.2
    ask(page, wait=False)
    expect(page.locator("#stop")).to_be_visible()
    expect(body_text(page)).to_have_text("One two three")  # the mark that is not closed yet
    expect(body_text(page)).to_have_text("One two three.")
    expect(last_answer(page).locator("strong")).to_have_text("three")
    figures = "13.2 tokens/s (14.1 predicted) · 3.00 tokens a step · 40% of the draft accepted"
    expect(last_answer(page).locator(".figures")).to_contain_text(figures)
    expect(page.locator("#resources")).to_have_text(
        "Context 668 of 4,096 · Memory 7.9 GB of 8.0 GB"
    )
    last_answer(page).locator("summary").click()
    expect(last_answer(page).locator(".reasoning .markdown")).to_have_text("Hmm.")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert server.requests[0]["stream_options"]["include_usage"] is True


def test_escape_stops_an_answer_and_the_server_sees_it(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer, server.pause_seconds = "word " * 1000, 0.02
    ask(page, wait=False)
    expect(body_text(page)).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(last_answer(page)).to_contain_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    for _ in range(100):
        if server.num_disconnected:
            break
        time.sleep(0.05)
    assert server.num_disconnected == 1
    server.answer, server.pause_seconds = "Next.", 0
    ask(page, "And now?")
    expect(body_text(page)).to_have_text("Next.")


def test_a_regenerated_answer_is_another_version_of_it(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer = "First."
    ask(page)
    server.answer = "Second."
    page.get_by_role("button", name="Regenerate this answer").click()
    expect(body_text(page)).to_have_text("Second.")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Hello"}]
    page.get_by_role("button", name="Previous version").click()
    expect(body_text(page)).to_have_text("First.")
    expect(page.get_by_label("Version 1 of 2")).to_be_visible()


def test_an_edited_message_is_sent_again_and_the_old_branch_stays(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    ask(page, "Whta?")
    page.get_by_role("button", name="Edit and send again").click()
    area = page.get_by_role("textbox", name="Edit your message")
    expect(area).to_be_focused()
    area.fill("What?")
    server.answer = "This."
    page.keyboard.press("Enter")
    expect(body_text(page)).to_have_text("This.")
    expect(page.locator(".bubble")).to_have_text("What?")
    assert [m["content"] for m in server.requests[1]["messages"]] == ["What?"]
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".bubble")).to_have_text("Whta?")
    expect(body_text(page)).to_have_text("Hello.")


def test_an_edit_stays_until_it_is_sent_or_cancelled(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    ask(page, "The first question")
    page.get_by_role("button", name="Edit and send again").click()
    area = page.get_by_role("textbox", name="Edit your message")
    area.fill("Half an hour of work")
    server.answer, server.pause_seconds = "word " * 40, 0.1
    ask(page, "Another question", wait=False)
    expect(body_text(page)).to_contain_text("word")
    area.press("Enter")  # not while an answer comes
    expect(page.locator("body:not(.busy)")).to_be_attached()
    server.pause_seconds = 0
    page.get_by_role("button", name="Regenerate this answer").last.click()
    expect(page.get_by_label("Version 2 of 2")).to_be_visible()
    expect(area).to_have_value("Half an hour of work")
    page.get_by_role("button", name="New conversation").click()
    expect(area).to_have_count(0)
    page.get_by_role("button", name="The first question").first.click()
    expect(area).to_have_value("Half an hour of work")
    area.press("Enter")
    expect(page.locator(".bubble")).to_have_text("Half an hour of work")
    sent = [[m["content"] for m in asked["messages"]][-1] for asked in server.requests]
    assert sent == ["The first question", *["Another question"] * 2, "Half an hour of work"]
    page.get_by_role("button", name="Edit and send again").click()
    area.fill("Not this")
    area.press("Escape")
    expect(page.locator(".bubble")).to_have_text("Half an hour of work")


def test_the_keys_of_an_input_method_end_nothing(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    press = """(field, [key, how]) => field.dispatchEvent(new KeyboardEvent(
        "keydown", { key, bubbles: true, cancelable: true, ...how }))"""
    server.answer, server.pause_seconds = "word " * 40, 0.1
    ask(page, wait=False)
    expect(body_text(page)).to_contain_text("word")
    prompt = page.locator("#prompt")
    prompt.fill("next")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        prompt.evaluate(press, ["Escape", how])  # would stop the answer
    expect(page.locator("body:not(.busy)")).to_be_attached(timeout=30000)
    expect(last_answer(page)).not_to_contain_text("Stopped.")
    page.get_by_role("button", name="Edit and send again").click()
    area = page.get_by_role("textbox", name="Edit your message")
    area.fill("edited")
    for key in ("Enter", "Escape"):
        for how in ({"isComposing": True}, {"keyCode": 229}):
            prompt.evaluate(press, [key, how])
            area.evaluate(press, [key, how])
    expect(area).to_have_value("edited")
    expect(prompt).to_have_value("next")
    assert len(server.requests) == 1


def test_enter_makes_a_line_on_a_touch_keyboard(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit(**PHONE))
    assert page.locator("#prompt").get_attribute("enterkeyhint") == "enter"
    page.locator("#prompt").fill("Hello")
    page.get_by_role("button", name="Send").tap()
    expect(last_answer(page).locator(".figures")).to_be_visible()
    page.get_by_role("button", name="Edit and send again").tap()
    page.keyboard.press("Enter")
    area = page.get_by_role("textbox", name="Edit your message")
    expect(area).to_have_value("Hello\n")
    assert area.get_attribute("enterkeyhint") == "enter"


def test_conversations_survive_a_reload_and_can_be_renamed_and_deleted(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    ask(page, "The first one")
    page.get_by_role("button", name="New conversation").click()
    server.answer = "Second answer."
    ask(page, "The second one")
    page.reload()
    expect(body_text(page)).to_have_text("Second answer.")
    titles = page.locator("#conversations .open-chat")
    expect(titles).to_have_text(["The second one", "The first one"])
    titles.last.click()
    expect(body_text(page)).to_have_text("Hello.")
    page.get_by_role("button", name="Rename “The first one”").click()
    page.get_by_role("textbox", name="Name of the conversation").fill("Renamed")
    page.keyboard.press("Enter")
    expect(titles.last).to_have_text("Renamed")
    page.get_by_role("button", name="Delete “Renamed”").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(titles).to_have_text(["The second one"])
    page.reload()
    expect(titles).to_have_text(["The second one"])


def test_what_was_streamed_before_a_reload_is_kept(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer, server.pause_seconds = "word " * 1000, 0.02
    ask(page, wait=False)
    expect(body_text(page)).to_contain_text("word word")
    page.reload()
    expect(body_text(page)).to_contain_text("word word")
    expect(page.locator("#send")).to_be_visible()


def test_an_export_is_imported_elsewhere_and_what_is_damaged_left_out(
    visit: Callable[..., Page], tmp_path: Path
) -> None:
    page = connected(visit())
    ask(page, "Kept")
    with page.expect_download() as started:
        page.get_by_role("button", name="Export all conversations").click()
    started.value.save_as(tmp_path / "kept.json")
    exported = json.loads((tmp_path / "kept.json").read_text("utf-8"))
    assert [m["text"] for m in exported["conversations"][0]["messages"]] == ["Kept", "Hello."]

    page.locator("#import-file").set_input_files(tmp_path / "kept.json")
    expect(page.locator("#announcer")).to_contain_text("0 conversations imported")
    expect(page.locator("#conversations .open-chat")).to_have_text(["Kept"])

    other = connected(visit())
    other.locator("#import-file").set_input_files(tmp_path / "kept.json")
    expect(other.locator("#conversations .open-chat")).to_have_text(["Kept"])
    whole = {**exported["conversations"][0], "id": "f" * 24, "title": "Whole"}
    exported["conversations"][0]["messages"] = exported["conversations"][0]["messages"][1:]
    exported["conversations"].append(whole)
    (tmp_path / "damaged.json").write_text(json.dumps(exported), "utf-8")
    other.locator("#import-file").set_input_files(tmp_path / "damaged.json")
    expect(other.get_by_role("alert")).to_contain_text("1 conversation was damaged")
    expect(other.locator("#conversations .open-chat")).to_have_count(2)


def test_a_full_storage_is_told_and_the_answer_still_shown(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    page.evaluate("() => localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 200))")
    server.answer = "y" * 2000
    ask(page)
    expect(body_text(page)).to_have_text("y" * 2000)
    expect(page.get_by_role("alert")).to_contain_text("storage is full")


def test_a_browser_that_keeps_nothing_is_told_and_answered(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    denied = "{ get() { throw new DOMException('Access is denied', 'SecurityError'); } }"
    names = ("localStorage", "sessionStorage")
    page = visit("".join(f"Object.defineProperty(window, '{name}', {denied});" for name in names))
    connected(page)
    expect(page.get_by_role("alert")).to_contain_text("blocks storage")
    ask(page, "The first one")
    expect(body_text(page)).to_have_text("Hello.")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "The second one")
    titles = page.locator("#conversations .open-chat")
    expect(titles).to_have_text(["The second one", "The first one"])
    page.get_by_role("button", name="Switch between light and dark").click()
    not_json = {"name": "a.json", "mimeType": "application/json", "buffer": b"{"}
    page.locator("#import-file").set_input_files(not_json)
    expect(page.get_by_role("alert")).to_contain_text("not JSON")
    page.get_by_role("alert").get_by_role("button", name="Close").click()
    expect(page.get_by_role("alert")).to_contain_text("blocks storage")
    page.get_by_role("alert").get_by_role("button", name="Close").click()
    expect(page.locator("#banner")).to_be_hidden()


def test_the_settings_are_sent_and_kept(visit: Callable[..., Page], server: ChatServer) -> None:
    page = connected(visit())
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("System prompt of this conversation").fill("Be brief.")
    values = {"Temperature": "0.7", "Top-p": "0.9", "Top-k": "40", "Min-p": "0.05", "Seed": "7"}
    for label, value in {**values, "Max tokens": "100"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Thinking").select_option("off")
    page.get_by_label("Effort").select_option("low")
    page.get_by_role("button", name="Save").click()
    page.reload()
    connected(page)
    ask(page)
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "reasoning_effort")
    assert [sent[name] for name in names] == [0.7, 0.9, 40, 0.05, 7, 100, "low"]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_dialog_is_closed_by_a_click_beside_it_alone(visit: Callable[..., Page]) -> None:
    page = connected(visit())
    page.get_by_role("button", name="System prompt and sampling").click()
    area = page.get_by_label("System prompt of this conversation")
    area.fill("A long system prompt")
    dialog = page.locator("#settings")
    box, field = dialog.bounding_box(), area.bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + 5)  # its padding
    expect(dialog).to_be_visible()
    page.mouse.move(field["x"] + 10, field["y"] + 10)
    page.mouse.down()
    page.mouse.move(10, field["y"] + 10)
    page.mouse.up()
    expect(dialog).to_be_visible()
    page.mouse.click(10, 10)
    expect(dialog).to_be_hidden()


def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    server.key = "secret"
    page = visit()
    page.get_by_label("API key", exact=True).last.fill("secret")
    page.keyboard.press("Enter")
    connected(page)
    ask(page)
    expect(body_text(page)).to_have_text("Hello.")
    assert page.evaluate("() => JSON.stringify({...localStorage}).includes('secret')") is False


def test_a_key_that_no_header_can_carry_is_refused(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    server.key = "secret"
    page = visit()
    field = page.get_by_label("API key", exact=True).last
    field.fill("“secret”")
    page.keyboard.press("Enter")
    expect(page.locator("#key-text")).to_have_text("The server does not accept this key.")
    field.fill("secret")
    page.keyboard.press("Enter")
    connected(page)


def test_a_server_with_too_many_requests_is_asked_again(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    busy = {"message": "256 requests are being answered", "code": "overloaded"}
    server.refusals.append((503, busy, {"Retry-After": "2"}))
    ask(page, wait=False)
    expect(last_answer(page)).to_contain_text("too many requests; trying again in")
    expect(body_text(page)).to_have_text("Hello.")


def test_a_full_queue_is_waited_for(visit: Callable[..., Page], server: ChatServer) -> None:
    page = connected(visit())
    server.refusals.append((503, QUEUE_FULL, {"Retry-After": "2"}))
    ask(page, wait=False)
    expect(last_answer(page)).to_contain_text("queue is full; trying again in")
    expect(body_text(page)).to_have_text("Hello.")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fails_with", "refusal", "said"),
    [
        ("error", None, "The device is lost"),
        ("cut", None, "before the answer was complete"),
        (
            None,
            {"message": "5000 tokens, room for 4096", "code": "context_length_exceeded"},
            "Start a new conversation",
        ),
        (None, {"message": "n must be 1", "code": "unsupported_value"}, "n must be 1"),
    ],
)
def test_an_error_is_told_and_can_be_tried_again(
    visit: Callable[..., Page],
    server: ChatServer,
    fails_with: str | None,
    refusal: dict[str, Any] | None,
    said: str,
) -> None:
    page = connected(visit())
    server.fails_with = fails_with
    server.refusals += [(400, refusal, {})] if refusal else []
    ask(page)
    expect(last_answer(page).locator(".error-note")).to_contain_text(said)
    server.fails_with, server.answer = None, "Now it works."
    page.get_by_role("button", name="Try again").click()
    expect(body_text(page)).to_have_text("Now it works.")


def test_an_earlier_answer_that_is_tried_again_takes_nothing_along(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    page.evaluate("() => localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 200))")
    server.fails_with, server.answer = "error", ""
    ask(page, "One")
    server.fails_with, server.answer = None, "Two is answered."
    ask(page, "Two")
    server.answer = "One is answered."
    page.get_by_role("button", name="Try again").click()
    expect(body_text(page)).to_have_text("One is answered.")
    page.evaluate("() => localStorage.removeItem('filler')")
    page.get_by_role("button", name="Previous version").click()
    expect(body_text(page)).to_have_text("Two is answered.")
    page.reload()
    expect(body_text(page)).to_have_text("Two is answered.")


def test_a_server_that_is_gone_is_told(browser: Any) -> None:
    with serving(ChatServer()) as server:
        page = browser.new_page()
        page.goto(server.address)
        connected(page)
    ask(page)
    expect(last_answer(page).locator(".error-note")).to_contain_text("does not answer")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    page.context.close()


def test_a_server_that_is_lost_in_an_answer_is_told_and_looked_for(browser: Any) -> None:
    with serving(ChatServer(answer="word " * 1000, pause_seconds=0.05)) as server:
        page = browser.new_page()
        page.goto(server.address)
        connected(page)
        ask(page, wait=False)
        expect(body_text(page)).to_contain_text("word word")
    expect(last_answer(page).locator(".error-note")).to_contain_text("What had come is kept")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    page.context.close()


def test_a_question_to_a_server_that_loads_is_asked_with_what_it_says_then(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    server.loads = True
    server.refusals += [(503, LOADING, {"Retry-After": "2"})] * 2
    page = visit("""localStorage.setItem("subspec.settings", '{"thinking": "off"}')""")
    ask(page, wait=False)
    expect(last_answer(page)).to_contain_text("still loading")
    server.loads = False
    page.get_by_role("button", name="Try now").click()
    connected(page)
    expect(body_text(page)).to_have_text("Hello.")
    assert server.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert all("model" not in asked for asked in server.requests)


def test_a_server_that_has_another_model_now_is_asked_about_itself_again(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.model = "SmolLM2-135M"
    ask(page)
    expect(page.locator("#model")).to_have_text("SmolLM2-135M")
    server.model = "Qwen3-8B"
    server.refusals.append((404, {"message": "Not here.", "code": "model_not_found"}, {}))
    ask(page)
    expect(last_answer(page).locator(".error-note")).to_contain_text("Not here.")
    expect(page.locator("#model")).to_have_text("Qwen3-8B")


def test_an_engine_that_has_failed_is_not_waited_for(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    error = {"message": "the engine has failed", "code": "engine_failed"}
    server.refusals += [(503, error, {"Retry-After": "1"})] * 2
    ask(page)
    expect(last_answer(page).locator(".error-note")).to_contain_text("must be started again")
    time.sleep(2)
    assert len(server.requests) == 1
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("body:not(.busy)")).to_be_attached()
    assert len(server.requests) == 2
    page.get_by_role("button", name="Try again").click()
    expect(body_text(page)).to_have_text("Hello.")


def test_another_tab_takes_neither_an_edit_nor_what_was_said(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    ask(page, "The first question")
    other = page.context.new_page()
    other.goto(server.address)
    connected(other)
    other.get_by_role("button", name="The first question").first.click()
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_role("textbox", name="Edit your message").fill("The edited question")
    server.answer = "Said elsewhere."
    ask(other, "Another question")
    expect(body_text(other)).to_have_text("Said elsewhere.")
    area = page.get_by_role("textbox", name="Edit your message")
    expect(area).to_have_value("The edited question")
    server.answer = "To the edit."
    area.press("Enter")
    expect(body_text(page)).to_have_text("To the edit.")
    expect(page.locator("body:not(.busy)")).to_be_attached()
    page.reload()
    said = page.evaluate(
        "() => Object.values(localStorage).filter(v => v.includes('messages'))"
        ".flatMap(v => JSON.parse(v).messages.map(m => m.text))"
    )
    assert {"The first question", "Another question", "Said elsewhere."} <= set(said)
    assert {"The edited question", "To the edit."} <= set(said)


def test_neither_another_tab_nor_a_new_name_moves_what_is_read(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer, server.reasoning = "A line.\n\n" * 100, "Hmm."
    ask(page, "A long one")
    page.locator("summary").click()
    again = page.get_by_role("button", name="Regenerate this answer").first
    again.focus()
    page.evaluate("() => scroller.scrollTop = 100")
    expect(page.locator("#to-end")).to_be_visible()

    def is_undisturbed() -> bool:
        expect(again).to_be_focused()
        expect(page.locator("details[open]")).to_have_count(1)
        return bool(page.evaluate("() => scroller.scrollTop") == 100)

    other = page.context.new_page()
    other.goto(server.address)
    connected(other)
    server.answer, server.reasoning = "Said elsewhere.", ""
    ask(other, "Something else")
    titles = page.locator("#conversations .open-chat")
    expect(titles).to_have_text(["Something else", "A long one"])
    assert is_undisturbed()
    other.get_by_role("button", name="A long one").first.click()
    ask(other, "Go on")
    expect(body_text(page)).to_have_text("Said elsewhere.")
    assert is_undisturbed()
    page.get_by_role("button", name="Rename “A long one”").focus()
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Name of the conversation").fill("Renamed")
    page.keyboard.press("Enter")
    expect(titles.first).to_have_text("Renamed")
    assert page.evaluate("() => scroller.scrollTop") == 100
    assert page.title() == "Renamed · subspec"


def test_a_short_way_up_leaves_an_answer_that_goes_on(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer, server.chunk_chars, server.pause_seconds = "A line.\n\n" * 1000, 9, 0.02
    ask(page, wait=False)
    left = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    page.wait_for_function("() => scroller.scrollTop > 200")
    assert page.evaluate(left) < 2
    page.evaluate("() => scroller.scrollTop -= 30")
    expect(page.locator("#to-end")).to_be_visible()
    top = page.evaluate("() => scroller.scrollTop")
    page.wait_for_function(f"() => {left} > 200")
    assert page.evaluate("() => scroller.scrollTop") == top
    page.evaluate("() => scroller.scrollTop = scroller.scrollHeight - scroller.clientHeight - 40")
    expect(page.locator("#to-end")).to_be_hidden()
    page.wait_for_function("top => scroller.scrollTop > top", arg=top + 300)
    assert page.evaluate(left) < 2
    page.keyboard.press("Escape")


def test_nothing_that_a_model_writes_runs_or_is_fetched(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer = server.reasoning = HOSTILE
    server.chunk_chars = 7
    ask(page, HOSTILE)
    page.locator("summary").click()
    assert page.evaluate("() => window.hacked") is None
    for selector in ("script", "img", "iframe", "style", "base", "svg *[onload]", "[onerror]"):
        assert page.locator(f"#messages {selector}").count() == 0, selector
    links = page.locator("#messages a")
    hrefs = [link.get_attribute("href") for link in links.all()]
    assert {h for h in hrefs if h.startswith("https://good")} == {"https://good.test/o"}
    assert all(re.match(r"(https?://|mailto:)", href) for href in hrefs)
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer nofollow"}
    assert "<script>window.hacked = 1</script>" in body_text(page).inner_text()


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "[" * 10_000 + "](" * 10_000, "*" * 10_000, "**a _b " * 10_000,
     "> " * 10_000, "- " * 10_000, "`" * 3 + "x" * 1_000_000, "|a" * 10_000, "![" * 10_000],
    ids=["a megabyte", "brackets", "asterisks", "emphasis", "quotes", "lists", "code", "bars",
         "images"],
)  # fmt: skip
def test_hostile_markdown_takes_a_bounded_time(
    visit: Callable[..., Page], server: ChatServer, text: str
) -> None:
    page = connected(visit())
    server.answer, server.chunk_chars = text, 20_000
    began = time.monotonic()
    ask(page)
    expect(last_answer(page).locator(".figures")).to_be_visible()
    assert time.monotonic() - began < 20
    assert page.evaluate("() => document.querySelectorAll('#messages *').length") < 20_000


def test_every_control_has_a_name_and_everything_works_by_keyboard(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(body_text(page)).to_have_text("Hello.")
    assert server.requests[0]["messages"][0]["content"] == "One\ntwo"
    expect(page.locator("#announcer")).to_contain_text("The answer is complete")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, a')]
            .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
            .map(e => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.ariaLabel ?? ''"))
        outline = page.evaluate(
            """() => document.activeElement.matches('body, #prompt') ? 2
                : parseInt(getComputedStyle(document.activeElement).outlineWidth)"""
        )
        assert outline >= 2
    assert {"Regenerate this answer", "Edit and send again"} <= reached
    assert "System prompt and sampling" in reached
    page.get_by_role("button", name="System prompt and sampling").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="System prompt and sampling")).to_be_focused()


def test_the_focus_is_never_lost(visit: Callable[..., Page], server: ChatServer) -> None:
    page = connected(visit())
    server.answer, server.pause_seconds = "word " * 10, 0.1
    prompt, stop = page.locator("#prompt"), page.locator("#stop")

    def press(name: str, key: str = "Enter") -> None:
        page.get_by_role("button", name=name).last.focus()
        page.keyboard.press(key)

    def is_handed_on() -> None:
        expect(stop).to_be_focused()
        expect(prompt).to_be_focused(timeout=30000)

    server.fails_with = "error"
    ask(page, "One")
    server.fails_with = None
    press("Try again")
    is_handed_on()
    for _ in range(2):
        press("Regenerate this answer")
        is_handed_on()
    press("Previous version")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Version 2 of 4")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Version 1 of 4")).to_be_visible()
    for number in (2, 3, 4):
        expect(page.get_by_role("button", name="Next version")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_label(f"Version {number} of 4")).to_be_visible()
    expect(page.get_by_role("button", name="Previous version")).to_be_focused()
    press("Edit and send again")
    page.keyboard.type(" more")
    page.keyboard.press("Enter")
    is_handed_on()
    server.pause_seconds = 0
    for title in ("Two", "Three"):
        page.get_by_role("button", name="New conversation").click()
        ask(page, title)
    press("Rename “Two”")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Rename “2”")).to_be_focused()
    for title, focused in (("2", "One"), ("One", "Three"), ("Three", "New conversation")):
        press(f"Delete “{title}”")
        page.get_by_role("button", name="Delete", exact=True).press("Enter")
        expect(page.get_by_role("button", name=focused, exact=True)).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Callable[..., Page], scheme: str) -> None:
    page = connected(visit(color_scheme=scheme))
    grounds = {
        "ground": "text muted accent danger",
        "side": "text muted",
        "raised": "text muted accent",
        "code": "text code-word code-text code-number code-comment code-call muted",
        "danger-ground": "danger",
        "accent": "on-accent",
    }
    for chosen in (scheme, {"light": "dark", "dark": "light"}[scheme]):
        for ground, texts in grounds.items():
            for text in texts.split():
                ratio = contrast(colour(page, text), colour(page, ground))
                assert ratio >= 4.5, f"{chosen}: {text} on {ground}: {ratio:.2f}"
        page.get_by_role("button", name="Switch between light and dark").click()


def colour(page: Page, name: str) -> str:
    """rgb(r, g, b), as it is drawn."""
    read = """name => {
        const drawn = document.createElement("span");
        drawn.style.color = `var(--${name})`;
        document.body.append(drawn);
        const found = getComputedStyle(drawn).color;
        drawn.remove();
        return found;
    }"""
    return str(page.evaluate(read, name))


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours in the form rgb(r, g, b)."""

    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"[0-9]+", text)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_has_a_drawer_and_nothing_is_wider_than_it(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit(**PHONE))
    server.answer = (
        "```\n" + "long " * 100 + "\n```\n\n" + "w" * 500 + "\n\n|a|b|\n|-|-|\n|c|" + "d" * 300
    )
    page.locator("#prompt").fill("Hello")
    page.get_by_role("button", name="Send").tap()
    expect(last_answer(page).locator(".figures")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert page.evaluate("() => scroller.scrollWidth - scroller.clientWidth") == 0
    expect(page.locator("#new-chat")).not_to_be_in_viewport()
    page.get_by_role("button", name="Open the menu").tap()
    expect(page.locator("#new-chat")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#new-chat")).not_to_be_in_viewport()
    expect(page.get_by_role("button", name="Open the menu")).to_be_focused()


def test_code_is_copied_as_it_was_written(visit: Callable[..., Page], server: ChatServer) -> None:
    page = connected(visit(permissions=["clipboard-read", "clipboard-write"]))
    server.answer = "```make\nall:\n\techo 'a' # **b**\n```"
    ask(page)
    page.locator(".code-head").get_by_role("button", name="Copy").click()
    expect(page.locator("#announcer")).to_contain_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "all:\n\techo 'a' # **b**"


def test_the_same_text_is_shown_streamed_or_whole(
    visit: Callable[..., Page], server: ChatServer
) -> None:
    page = connected(visit())
    server.answer = (Path(__file__).parents[3] / "docs" / "structures.md").read_text("utf-8")
    shown = []
    for server.chunk_chars, server.pause_seconds in ((40, 0.002), (10**6, 0)):
        ask(page)
        shown.append(body_text(page).evaluate("element => element.innerHTML"))
    assert shown[0] == shown[1]


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_pages_functions_do_what_their_own_tests_say(tmp_path: Path) -> None:
    pages = Path(__file__).parents[3] / "runtime" / "server" / "page"
    for file in [*pages.glob("*.js"), Path(__file__).parent / "page_functions.test.mjs"]:
        shutil.copy(file, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}', "utf-8")
    command = ["node", "--test", "page_functions.test.mjs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
