"""The files of the chat page and how the server gives them. tests/serve/test_web_browser.py uses the page."""

from __future__ import annotations

import asyncio
import re
import shutil
from html.parser import HTMLParser

import pytest
from serve.service import client_of, running_engine

from glm_ms.serve.auth import Keys
from glm_ms.serve.web_page import FOLDER, TYPES, ChatPage

FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]


async def inner(scope, receive, send):
    """The app behind the page: status 418."""
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"inner"})


def get(path: str, method: str = "GET", headers: dict[str, str] | None = None, app: ChatPage | None = None):
    """Status, headers and body of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run((app or ChatPage(inner))(scope, None, send))
    start, *bodies = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(message["body"] for message in bodies)


class Page(HTMLParser):
    """Attributes of all elements of index.html, and texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed((FOLDER / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_comes_whole_with_its_type_and_the_policy(path):
    address = "/" if path.name == "index.html" else f"/web/{path.name}"
    status, headers, body = get(address)
    assert (status, body) == (200, path.read_bytes())
    assert headers["content-type"] == TYPES[path.suffix]
    assert headers["content-length"] == str(len(body))
    assert headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]


def test_the_rest_is_for_the_app():
    for path, method in [("/", "POST"), ("/web/", "GET"), ("/web/index.html", "GET"), ("/web/../web_page.py", "GET"),
                         ("/web/app.js", "DELETE"), ("/v1/models", "GET")]:  # fmt: skip
        assert get(path, method)[0] == 418, (path, method)


def test_the_server_with_a_key_gives_the_page_without_one(tokenizer):
    """And nothing else: `POST /` is the interface of the ChatGLM demos."""
    with running_engine(tokenizer) as engine, client_of(engine, keys=Keys(["k" * 20]), web=True) as client:
        assert client.get("/").content == (FOLDER / "index.html").read_bytes()
        assert client.get("/web/app.js").status_code == 200
        for path in ("/v1/models", "/web/", "/web/other.js"):
            assert client.get(path).status_code == 401, path
        assert client.post("/", json={"prompt": "hello"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {'k' * 20}"}).status_code == 200
    with client_of(engine) as client:
        assert client.get("/").status_code in (404, 405)


def test_a_browser_that_has_the_file_gets_no_body():
    _, headers, whole = get("/web/app.js")
    status, again, body = get("/web/app.js", headers={"if-none-match": headers["etag"]})
    assert (status, body, again["etag"]) == (304, b"", headers["etag"])
    status, head, body = get("/web/app.js", "HEAD")
    assert (status, body, head["content-length"]) == (200, b"", str(len(whole)))


def test_other_content_has_another_etag(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "web")
    (tmp_path / "web" / "app.js").write_text("// changed", encoding="utf-8")
    changed = ChatPage(inner, tmp_path / "web")
    assert get("/web/app.js", app=changed)[1]["etag"] != get("/web/app.js")[1]["etag"]
    assert get("/", app=changed)[1]["etag"] == get("/")[1]["etag"]


def test_an_installation_without_the_page_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.html: no such file; reinstall"):
        ChatPage(inner, tmp_path)


def test_nothing_is_loaded_from_elsewhere():
    for path in FILES:
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", path.read_text(encoding="utf-8"))
        assert [link for link in found if "www.w3.org/2000/svg" not in link] == [], path.name
    names = {path.name for path in FILES}
    page = Page()
    linked = [*page.values("src"), *(value for value in page.values("href") if not value.startswith("#"))]
    assert linked
    assert {link.removeprefix("web/") for link in linked} <= names
    for path in SCRIPTS:
        imported = re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))
        assert set(imported) <= names, path.name


def test_the_page_needs_nothing_that_the_policy_forbids():
    """No inline scripts, styles or handlers, and no HTML made of text."""
    page = Page()
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
    code = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code)


def tables() -> dict[str, dict[str, str]]:
    """The texts of the page: name of a table -> key -> text."""
    source = (FOLDER / "text.js").read_text(encoding="utf-8")
    found = re.findall(r"^const (ENGLISH|CHINESE) = \{\n(.*?)^\};", source, re.MULTILINE | re.DOTALL)
    return {name: dict(re.findall(r'^  (\w+): "(.*)",$', body, re.MULTILINE)) for name, body in found}


def test_both_languages_say_the_same():
    english, chinese = tables()["ENGLISH"], tables()["CHINESE"]
    assert list(english) == list(chinese)
    assert len(english) > 50
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_texts_that_are_used_exist_and_those_that_exist_are_used():
    page = Page()
    code = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS if path.name != "text.js")
    in_page = {key for attribute in ("data-text", "data-label", "data-hint") for key in page.values(attribute)}
    in_code = set(re.findall(r'(?:say|button)\("(\w+)"', code))
    known = set(tables()["ENGLISH"])
    assert (in_page | in_code) <= known
    # Roles and states of messages, and names of fields, are texts too.
    built = {"user", "assistant", "tool", "finished", "stopped", "cut"}
    assert known - in_page - in_code <= built


def test_elements_that_scripts_look_for_exist():
    ids = set(Page().values("id"))
    code = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    wanted = set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', code))
    assert len(wanted) > 15
    assert wanted <= ids
    assert len(Page().values("id")) == len(ids)
