"""The chat page in Chromium, against a scripted server: what a user does, and what goes wrong around it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("playwright", reason="playwright missing: pip install '.[browser]'")
pytest.importorskip("uvicorn", reason="uvicorn missing: pip install '.[serve]'")

from playwright.sync_api import Error, expect, sync_playwright
from serve.chat_api import CALLS, CODE, EMOJI, HTML, KEY, NORMAL, Api, wait_until
from serve.chat_helpers import WEATHER, Speaker, called
from serve.service import running_engine, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium missing: apt-get install chromium"),
]
PHONE = {"width": 360, "height": 640}
FINGER = 44  # CSS pixels
TOOLS = [{"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}]
MILLISECONDS = 10_000


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers lack; the pages are ours.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def api():
    server = Api()
    yield server
    server.close()


class User:
    """Somebody with one browser profile; `tab()` opens the page. Everything that is wrong in a console is noted."""

    def __init__(self, browser, api: Api, **options) -> None:
        self.api = api
        self.problems: list[str] = []
        self.addresses: list[str] = []
        self.context = browser.new_context(**{"locale": "en-GB", **options})
        self.context.set_default_timeout(MILLISECONDS)

    def tab(self, fragment: str = ""):
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._note)
        page.on("request", lambda request: self.addresses.append(request.url))
        page.goto(self.api.url + fragment)
        expect(page.locator("#model option")).not_to_have_count(0)
        return page

    def _note(self, message) -> None:
        # Chromium writes failed requests to the console; tests that cause them check what the page says.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)


@pytest.fixture
def user(browser, api):
    made = User(browser, api)
    yield made
    made.context.close()
    assert made.problems == []
    assert all(address.startswith((api.url, "blob:")) for address in made.addresses)


def send(page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answers(page):
    return page.locator("article[data-role=assistant]")


def ask(page, text: str) -> None:
    """Sends a message and waits for the whole answer."""
    before = page.locator("article[data-role=user]").count()
    send(page, text)
    expect(page.locator("article[data-role=user]")).to_have_count(before + 1)
    expect(page.locator("#stop")).to_be_hidden()
    expect(answers(page).last).to_have_attribute("data-state", re.compile("done|cut"))


def click(page, action: str, place: int = -1) -> None:
    page.locator(f"[data-action={action}]").nth(place).click()


def stored(page) -> list[dict]:
    """The conversations in the storage of the browser."""
    texts = page.evaluate(
        "Object.entries(localStorage).filter(([key]) => key.startsWith('glm-ms.chat.')).map(([, text]) => text)"
    )
    return [json.loads(text) for text in texts]


def save_settings(page, **values: str) -> None:
    page.locator("#open-settings").click()
    for name, value in values.items():
        field = page.locator(f"#settings [name={name}]")
        if name == "theme":
            field.select_option(value)
        else:
            field.fill(value)
    page.locator("#settings button[value=save]").click()


# Streams


def test_an_answer_streams_and_characters_come_whole(user, api):
    page = user.tab()
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector("article:last-child .body")?.textContent))
            .observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true });
    }""")
    ask(page, "emoji")
    assert answers(page).last.locator(".body").inner_text() == EMOJI
    seen = [text for text in page.evaluate("window.seen") if text and text != "emoji"]
    assert len(set(seen)) > 2, "it did not stream"
    assert all(EMOJI.startswith(text) for text in seen)
    assert "21 tokens" in answers(page).last.inner_text()
    request = api.requests[0]
    assert request["messages"] == [{"role": "user", "content": "emoji"}]
    assert request["model"] == "glm3"
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert request["x-session-id"] == stored(page)[0]["id"]


def test_the_earlier_turns_are_sent(user, api):
    page = user.tab()
    ask(page, "one")
    ask(page, "two")
    assert [message["content"] for message in api.requests[1]["messages"]] == ["one", NORMAL.format("one"), "two"]


def test_events_are_the_same_however_the_bytes_are_cut(user):
    page = user.tab()
    found = page.evaluate("""async () => {
        const { events } = await import("/web/api.js");
        const bytes = new TextEncoder().encode(
            ": hello\\r\\ndata: {\\"a\\": \\"👩‍👧\\"}\\r\\n\\r\\n" +
            "event: x\\ndata:one\\ndata: two\\n\\n\\ndata: [DONE]\\n\\ndata: open");
        const results = [];
        for (let size = 1; size <= bytes.length; size += 1) {
            const stream = new ReadableStream({ start(controller) {
                for (let n = 0; n < bytes.length; n += size) controller.enqueue(bytes.slice(n, n + size));
                controller.close();
            } });
            const got = [];
            for await (const data of events(stream)) got.push(data);
            results.push(JSON.stringify(got));
        }
        return [...new Set(results)];
    }""")
    assert [json.loads(text) for text in found] == [['{"a": "👩‍👧"}', "one\ntwo", "[DONE]"]]


def test_stop_ends_the_request_and_keeps_the_text(user, api):
    page = user.tab()
    send(page, "long")
    expect(answers(page).last).to_contain_text("word word word")
    page.locator("#stop").click()
    expect(answers(page).last).to_have_attribute("data-state", "stopped")
    wait_until(lambda: api.left == 1)
    text = answers(page).last.locator(".body").inner_text()
    assert text.startswith("word word word")
    assert stored(page)[0]["messages"][-1]["content"].strip() == text.strip()
    click(page, "retry")
    expect(answers(page)).to_have_count(1)
    expect(answers(page).last).to_have_attribute("data-state", "streaming")
    page.locator("#stop").click()
    wait_until(lambda: api.left == 2)
    assert [message["content"] for message in api.requests[1]["messages"]] == ["long"]


def test_an_answer_that_was_cut_by_its_limit_says_so(user):
    page = user.tab()
    ask(page, "short")
    expect(answers(page).last).to_contain_text("Cut at the limit of tokens.")


def test_retry_replaces_the_answer_and_edit_what_follows(user, api):
    page = user.tab()
    ask(page, "one")
    ask(page, "two")
    click(page, "retry")
    expect(answers(page).last).to_have_attribute("data-state", "done")
    assert api.requests[2]["messages"] == api.requests[1]["messages"]
    click(page, "edit", 0)
    box = page.locator("article textarea")
    expect(box).to_have_value("one")
    box.fill("three")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator("article")).to_have_count(2)
    expect(answers(page).last).to_contain_text(NORMAL.format("three"))
    assert [message["content"] for message in api.requests[3]["messages"]] == ["three"]
    click(page, "edit", 0)
    page.locator("article textarea").press("Escape")
    expect(page.locator("article").first).to_contain_text("three")


# What models write


def test_html_of_a_model_is_text(user):
    page = user.tab()
    ask(page, "html")
    assert answers(page).last.locator(".body").inner_text() == HTML
    assert page.locator("#log img, #log script").count() == 0
    assert page.title() == "glm_ms"


def test_code_has_a_frame_and_can_be_copied(browser, api):
    user = User(browser, api, permissions=["clipboard-read", "clipboard-write"])
    page = user.tab()
    ask(page, "code")
    block = answers(page).last.locator(".block")
    assert block.locator("pre").inner_text() == "print('<b>hi</b>')"
    expect(answers(page).last.locator("p code")).to_have_text("more")
    block.get_by_role("button", name="Copy").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>hi</b>')"
    click(page, "copy")
    page.wait_for_function("async text => (await navigator.clipboard.readText()) === text", arg=CODE)
    user.context.close()


def test_tool_calls_are_shown_and_results_go_back(user, api):
    page = user.tab()
    save_settings(page, tools=json.dumps(TOOLS))
    ask(page, "call")
    assert api.requests[0]["tools"] == [{"type": "function", "function": TOOLS[0]}]
    cards = page.locator(".call")
    expect(cards).to_have_count(2)
    for place, (name, arguments) in enumerate(CALLS):
        expect(cards.nth(place).locator("summary")).to_have_text(f"Call of {name}")
        assert json.loads(cards.nth(place).locator("pre").inner_text()) == json.loads(arguments)
    send(page, "next")
    expect(page.locator("#notice")).to_contain_text("Fill in the results")
    assert len(api.requests) == 1
    cards.nth(0).locator("textarea").fill('{"degrees": 31}')
    cards.nth(1).locator("textarea").fill("12:00")
    click(page, "sendResults")
    expect(answers(page).last).to_contain_text(NORMAL.format("12:00"))
    _, call, first, second = api.requests[1]["messages"]
    assert [(one["id"], one["function"]["name"], one["function"]["arguments"]) for one in call["tool_calls"]] == [
        (f"call_{place}", *pair) for place, pair in enumerate(CALLS)
    ]
    assert first == {"role": "tool", "content": '{"degrees": 31}', "tool_call_id": "call_0"}
    assert second == {"role": "tool", "content": "12:00", "tool_call_id": "call_1"}
    expect(page.locator("article[data-role=tool] h2").first).to_have_text("Result of get_weather")


# Settings


def test_settings_reach_the_request(user, api):
    page = user.tab()
    save_settings(page, system="Be brief.", max_tokens="64", temperature="0.7", top_p="0.8", top_k="20",
                  repetition_penalty="1.1", seed="7", stop="END\n###")  # fmt: skip
    page.locator("#model").select_option("adverts")
    ask(page, "one")
    request = api.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    expected = {"model": "adverts", "max_tokens": 64, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                "repetition_penalty": 1.1, "seed": 7, "stop": ["END", "###"]}  # fmt: skip
    assert {name: request[name] for name in expected} == expected
    page.reload()
    expect(page.locator("#model")).to_have_value("adverts")
    page.locator("#open-settings").click()
    expect(page.locator("#settings [name=top_p]")).to_have_value("0.8")
    page.locator("#settings [name=top_p]").fill("")
    page.locator("#settings button[value=save]").click()
    ask(page, "two")
    assert "top_p" not in api.requests[1]
    page.locator("#new").click()
    ask(page, "three")
    assert api.requests[2]["temperature"] == 0.7, "a new conversation begins with the settings of the last one"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": "-1"}, "Temperature: "),
        ({"max_tokens": "1.5"}, "Most tokens of an answer: "),
        ({"tools": '{"name": "f"}'}, "Tools: not a JSON list"),
        ({"tools": "[{}]"}, "Tools: not a JSON list"),
        ({"tools": "[1,"}, "Tools: not a JSON list"),
    ],
)
def test_wrong_settings_are_refused(user, values, text):
    page = user.tab()
    save_settings(page, **values)
    expect(page.locator("#settings-error")).to_contain_text(text)
    page.locator("#cancel-settings").click()
    page.locator("#open-settings").click()
    for name in values:
        expect(page.locator(f"#settings [name={name}]")).to_have_value("")


def test_a_key_is_asked_for_and_not_stored_for_long(browser):
    api = Api(key=KEY)
    user = User(browser, api)
    page = user.context.new_page()
    page.goto(api.url)
    expect(page.locator("#notice")).to_contain_text("The server wants an API key")
    page.locator("#notice button").click()
    expect(page.locator("#settings [name=key]")).to_be_focused()
    page.locator("#settings [name=key]").fill(KEY)
    page.locator("#settings [name=key]").press("Enter")
    expect(page.locator("#model option")).to_have_count(2)
    ask(page, "one")
    assert api.requests[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    with page.expect_download() as download:
        page.locator("#export").click()
    assert KEY not in Path(download.value.path()).read_text(encoding="utf-8")
    page.reload()
    ask(page, "two")
    user.context.close()
    api.close()


# Conversations


def test_a_reload_shows_the_same_conversation(user):
    page = user.tab()
    ask(page, "one")
    shown = page.locator("#log").inner_text()
    page.reload()
    expect(page.locator("article")).to_have_count(2)
    assert page.locator("#log").inner_text() == shown
    expect(page.locator("#list [aria-current]")).to_have_text("one")


def test_a_reload_within_an_answer_keeps_what_has_come(user, api):
    page = user.tab()
    send(page, "long")
    expect(answers(page).last).to_contain_text("word word word")
    page.reload()
    expect(answers(page).last).to_have_attribute("data-state", "stopped")
    expect(answers(page).last).to_contain_text("word word word")
    wait_until(lambda: api.left == 1)
    ask(page, "next")
    sent = api.requests[1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].startswith("word word word")


def test_a_conversation_streams_while_another_one_is_shown(user, api):
    page = user.tab()
    send(page, "wait")
    expect(answers(page).last).to_contain_text("first")
    page.locator("#new").click()
    ask(page, "two")
    expect(page.locator("#list li")).to_have_count(2)
    api.gate.set()
    page.locator("#list .title", has_text="wait").click()
    expect(answers(page).last).to_contain_text("first then")
    page.go_back()
    expect(answers(page).last).to_contain_text(NORMAL.format("two"))


def test_two_tabs_share_conversations(user, api):
    one = user.tab()
    two = user.tab()
    send(one, "wait")
    expect(two.locator("#list .title")).to_have_text("wait")
    two.locator("#list .title").click()
    expect(answers(two).last).to_contain_text("first")
    expect(two.locator("#send")).to_be_disabled()
    send(two, "too early")
    assert len(api.requests) == 1
    api.gate.set()
    expect(answers(two).last).to_contain_text("first then")
    expect(answers(two).last).to_have_attribute("data-state", "done")
    ask(two, "more")
    expect(answers(one).last).to_contain_text(NORMAL.format("more"))
    assert len(stored(one)[0]["messages"]) == 4
    two.locator("#new").click()
    ask(two, "own")
    expect(one.locator("#list li")).to_have_count(2)
    expect(answers(one).last).to_contain_text(NORMAL.format("more"))


def test_a_conversation_that_another_tab_deletes_stops(user, api):
    one = user.tab()
    two = user.tab()
    send(one, "long")
    expect(answers(one).last).to_contain_text("word word")
    two.locator("#list").get_by_role("button", name="Delete").click()
    wait_until(lambda: api.left == 1)
    expect(one.locator("#stop")).to_be_hidden()
    assert stored(two) == []


def test_an_answer_of_a_tab_that_crashed_is_stopped(user):
    page = user.tab()
    ask(page, "one")
    page.evaluate("""() => {
        const [key, text] = Object.entries(localStorage).find(([key]) => key.startsWith("glm-ms.chat."));
        const conversation = JSON.parse(text);
        Object.assign(conversation.messages[1], { state: "streaming", beat: Date.now() - 60000 });
        localStorage.setItem(key, JSON.stringify(conversation));
    }""")
    page.reload()
    expect(answers(page).last).to_have_attribute("data-state", "stopped")
    expect(page.locator("#send")).to_be_enabled()


def test_clear_and_delete_can_be_undone(user):
    page = user.tab()
    ask(page, "one")
    page.locator("#clear").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(2)
    page.locator("#list").get_by_role("button", name="Delete").click()
    expect(page.locator("article")).to_have_count(0)
    assert stored(page) == []
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(2)
    assert len(stored(page)) == 1


def test_export_and_import(user, api, tmp_path):
    page = user.tab()
    save_settings(page, system="Be brief.")
    ask(page, "emoji")
    with page.expect_download() as download:
        page.locator("#export").click()
    assert download.value.suggested_filename == "glm_ms emoji.json"
    path = tmp_path / "saved.json"
    download.value.save_as(path)
    assert [message["content"] for message in json.loads(path.read_text(encoding="utf-8"))["messages"]] == [
        "emoji",
        EMOJI,
    ]
    page.locator("#list").get_by_role("button", name="Delete").click()
    page.locator("#import-file").set_input_files(path)
    expect(answers(page).last).to_contain_text(EMOJI)
    page.locator("#import-file").set_input_files(path)
    expect(page.locator("#list li")).to_have_count(2)
    ask(page, "one")
    assert api.requests[1]["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize(
    "text",
    ["", "[1,", "null", '{"id": "x"}', '{"id":"x/../y","created":1,"updated":1,"settings":{},"messages":[]}',
     '{"id":"x","created":1,"updated":1,"settings":{},"messages":[{"role":"user","content":5,"id":"a"}]}'],
)  # fmt: skip
def test_files_that_are_no_conversations_are_refused(user, tmp_path, text):
    page = user.tab()
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    page.locator("#import-file").set_input_files(path)
    expect(page.locator("#notice")).to_contain_text("other.json is not a conversation")


def test_broken_entries_in_the_storage_do_no_harm(user):
    page = user.tab()
    page.evaluate("localStorage.setItem('glm-ms.chat.broken', '{'), localStorage.setItem('glm-ms.chat.null', 'null')")
    page.goto(user.api.url + "#broken")
    page.reload()
    ask(page, "one")
    expect(page.locator("#list li")).to_have_count(1)


def test_a_full_storage_is_reported_and_the_chat_continues(user, api):
    page = user.tab()
    page.evaluate("""() => {
        for (let size = 1 << 22; size >= 1; size >>= 1) {
            try {
                for (let n = 0; ; n += 1) localStorage.setItem(`other.${size}.${n}`, "x".repeat(size));
            } catch {}
        }
    }""")
    send(page, "one")
    expect(page.locator("#notice")).to_contain_text("storage of the browser is full")
    expect(answers(page).last).to_contain_text(NORMAL.format("one"))
    ask(page, "two")
    assert api.requests[1]["messages"][0]["content"] == "one"


def test_without_storage_the_page_works_and_says_so(user):
    user.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = user.tab()
    expect(page.locator("#notice")).to_contain_text("does not store data")
    ask(page, "one")
    ask(page, "two")
    expect(page.locator("article")).to_have_count(4)


# A server that is busy, broken or away


def test_a_full_queue_is_waited_for(user, api):
    page = user.tab()
    api.busy = 1
    send(page, "one")
    expect(page.locator("#notice")).to_contain_text("next try in 1 s")
    expect(answers(page).last).to_contain_text(NORMAL.format("one"))
    expect(page.locator("#notice")).to_be_hidden()
    api.busy = 1
    send(page, "two")
    expect(page.locator("#notice")).to_contain_text("next try in 1 s")
    page.locator("#stop").click()
    expect(answers(page).last).to_have_attribute("data-state", "stopped")


def test_an_error_of_the_server_is_shown_and_not_part_of_the_next_request(user, api):
    page = user.tab()
    send(page, "error")
    expect(answers(page).last).to_contain_text("Error 400: the prompt is too long")
    ask(page, "one")
    assert [message["content"] for message in api.requests[1]["messages"]] == ["one"]


def test_a_stream_that_breaks_keeps_its_text_and_can_be_retried(user, api):
    page = user.tab()
    send(page, "cut")
    expect(answers(page).last).to_have_attribute("data-state", "failed")
    expect(answers(page).last).to_contain_text("half an ans")
    expect(answers(page).last).to_contain_text("connection to the server was lost")
    click(page, "retry")
    expect(answers(page)).to_have_count(1)
    wait_until(lambda: len(api.requests) == 2)


def test_a_server_that_restarts_is_found_again(browser):
    first = Api()
    user = User(browser, first)
    page = user.tab()
    ask(page, "one")
    send(page, "long")
    expect(answers(page).last).to_contain_text("word word")
    first.close()
    expect(answers(page).last).to_have_attribute("data-state", "failed")
    expect(page.locator("#notice")).to_contain_text("The server is not ready")
    assert stored(page)[0]["messages"][3]["content"].startswith("word word")
    second = Api(port=first.port)
    expect(page.locator("#notice")).to_contain_text("The server is ready.")
    click(page, "edit")
    page.locator("article textarea").fill("two")
    page.get_by_role("button", name="Send again").click()
    expect(answers(page).last).to_contain_text(NORMAL.format("two"))
    user.context.close()
    second.close()
    assert user.problems == []


# Keyboard, languages, colours, sizes


def test_keys(user, api):
    page = user.tab()
    prompt = page.locator("#prompt")
    prompt.press("a")
    prompt.press("Shift+Enter")
    prompt.press("b")
    expect(prompt).to_have_value("a\nb")
    # Enter within an input method chooses a word.
    prompt.evaluate("node => node.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', isComposing: true }))")
    prompt.evaluate("node => node.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', keyCode: 229 }))")
    expect(prompt).to_have_value("a\nb")
    prompt.press("Enter")
    expect(answers(page).last).to_contain_text("42")
    prompt.fill("  \n ")
    prompt.press("Enter")
    assert [request["messages"][0]["content"] for request in api.requests] == ["a\nb"]


def test_languages(browser, api):
    user = User(browser, api, locale="zh-CN")
    page = user.tab()
    expect(page.locator("#send")).to_have_text("发送")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    ask(page, "one")
    expect(answers(page).last).to_contain_text("每秒")
    page.locator("#language").click()
    expect(page.locator("#send")).to_have_text("Send")
    expect(answers(page).last).to_contain_text("per second")
    page.reload()
    expect(page.locator("#send")).to_have_text("Send")
    user.context.close()


def test_colours(browser, api):
    user = User(browser, api, color_scheme="dark")
    page = user.tab()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    save_settings(page, theme="light")
    assert page.evaluate(background) == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    save_settings(page, theme="dark")
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == dark
    user.context.close()


def test_a_phone(browser, api):
    user = User(browser, api, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = user.tab()
    ask(page, "code")
    ask(page, "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    expect(page.locator("#side")).to_be_hidden()
    page.locator("#open-side").tap()
    expect(page.locator("#close-side")).to_be_focused()
    page.locator("#new").tap()
    expect(page.locator("#side")).to_be_hidden()
    for control in ("#open-side", "#send", "#open-settings", "#language"):
        assert page.locator(control).bounding_box()["height"] >= FINGER, control
    page.locator("#open-settings").tap()
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    user.context.close()


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark", "locale": "zh-CN"}, {"viewport": PHONE}], ids=str)
def test_accessibility(browser, api, options):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python missing")
    user = User(browser, api, **options)
    page = user.tab()
    send(page, "error")
    expect(answers(page).last).to_have_attribute("data-state", "failed")
    for text in ("code", "call"):
        ask(page, text)
    for opened in (None, "#open-settings"):
        if opened:
            page.locator(opened).click()
        violations = axe.Axe().run(page).response["violations"]
        assert [(found["id"], [node["html"] for node in found["nodes"]]) for found in violations] == []
    user.context.close()


def test_the_policy_blocks_inline_code(user):
    """The rules are in force: code that gets into the page does not run."""
    page = user.tab()
    with pytest.raises(Error, match=r"Trusted|assignment"):
        page.evaluate("document.body.innerHTML = '<p>'")
    blocked = page.evaluate("""() => new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => {});
    })""")
    assert blocked == "connect-src"
    user.problems.clear()  # Chromium reports the blocked fetch in the console
    user.addresses = [address for address in user.addresses if ":9/" not in address]


# The application itself, over a network that says what the test wants


@pytest.fixture(scope="module")
def application(tokenizer):
    speaker = Speaker(tokenizer)
    with running_engine(tokenizer, speaker) as engine, running_server(engine, web=True) as url:
        yield SimpleNamespace(url=f"{url}/", speaker=speaker, engine=engine)


@pytest.fixture
def real(browser, application):
    made = User(browser, application)
    yield made
    made.context.close()
    assert made.problems == []


def test_a_conversation_with_the_application(real, application, tokenizer):
    page = real.tab()
    expect(page.locator("#model")).to_have_value("tiny")
    save_settings(
        page, system="Be brief.", temperature="0", max_tokens="200", top_p="0.9", top_k="5", seed="1", stop="END"
    )
    count = len(application.speaker.say("\n " + EMOJI))
    ask(page, "hello")
    assert answers(page).last.locator(".body").inner_text() == EMOJI
    assert f"{count} tokens" in answers(page).last.inner_text()
    application.speaker.say("\n once moreEND and more")
    ask(page, "again")
    assert answers(page).last.locator(".body").inner_text() == "once more"
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
               {"role": "assistant", "content": EMOJI}]  # fmt: skip
    assert application.speaker.prompts[-1] == tokenizer.build_chat_input("again", history)["input_ids"]


def test_a_tool_call_with_the_application(real, application, tokenizer):
    page = real.tab()
    save_settings(page, tools=json.dumps([WEATHER]))
    application.speaker.say(called("get_weather", "city='北京', days=2"), end="<|observation|>")
    ask(page, "hello")
    expect(page.locator(".call summary")).to_have_text("Call of get_weather")
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": "北京", "days": 2}
    application.speaker.say("\n It is hot.")
    page.locator(".call textarea").fill('{"degrees": 31}')
    click(page, "sendResults")
    expect(answers(page).last).to_contain_text("It is hot.")
    assert tokenizer.get_command("<|observation|>") in application.speaker.prompts[-1]
    assert '{"degrees": 31}' in application.speaker.prompt


def test_stop_and_a_closed_tab_free_their_slots(real, application):
    application.speaker.say("\n " + "word " * 3000, end=None)
    page = real.tab()
    send(page, "hello")
    expect(answers(page).last).to_contain_text("word word")
    assert len(application.speaker.running) == 1
    page.locator("#stop").click()
    wait_until(lambda: not application.speaker.running)
    send(page, "hello again")
    expect(answers(page).last).to_contain_text("word word")
    page.close()
    wait_until(lambda: not application.speaker.running)


def test_what_the_application_refuses_is_shown(real, application):
    page = real.tab()
    send(page, "word " * 5000)
    expect(answers(page).last).to_contain_text("Error 400")
    expect(answers(page).last).to_contain_text("at most 4096")
    application.engine.stopping = True
    send(page, "hello")
    expect(page.locator("#notice")).to_contain_text("The server is busy; next try in 5 s.")
    application.engine.stopping = False
    application.speaker.say("\n back")
    expect(answers(page).last).to_contain_text("back")
