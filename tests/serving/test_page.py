"""The chat page: one file that asks nobody else; what a person sees of it in a real browser."""

from __future__ import annotations

import contextlib
import importlib.resources
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from chromium import NAMES, Browser, find_browser
from page_toy import every, figures, problem, say, text, tip, tokens, visit
from scripted import ANSWERS, HOSTILE, PAGE, Scripted
from wire_toy import ScriptedEngine, app_of, byte_tokenizer, logp_of

from aspo_jax.serving.server import listen, make_server

HTML = PAGE.read_text()
SCRIPT = re.search(r"<script>(.*)</script>", HTML, re.DOTALL)
VOID = {"meta", "link", "input"}


class Elements(HTMLParser):
    """The page's elements with their attributes and enclosing tags; a wrong nesting is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None], list[str]]]:
    parser = Elements()
    parser.feed(HTML)
    parser.close()
    assert parser.open == []
    return parser.found


# --- the file -----------------------------------------------------------------------------------


def test_it_is_part_of_the_package_and_small():
    packaged = importlib.resources.files("aspo_jax").joinpath("serving", "page.html")
    assert packaged.read_text() == HTML
    assert len(HTML.encode()) < 40_000


def test_it_asks_nobody_else():
    assert re.findall(r"https?:|wss?:|\bsrc=|\bimport\b|url\(|WebSocket|EventSource", HTML) == []
    assert re.findall(r'href="([^"]*)"', HTML) == ["data:,"]
    assert re.findall(r"\bfetch\(", HTML) == ["fetch("]
    assert set(re.findall(r'"(/?v1[^"]*)"', HTML)) == {
        *("v1/models", "v1/completions", "v1/chat/completions")
    }


def test_text_stays_text_and_nothing_is_kept():
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function"
    assert re.findall(ways, HTML) == []
    assert re.findall(r"localStorage|sessionStorage|indexedDB|cookie", HTML) == []
    assert "require-trusted-types-for 'script'" in HTML and "default-src 'none'" in HTML


def test_every_control_is_there_once_and_has_a_name(elements):
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', HTML)) <= set(ids)
    for tag, attributes, around in elements:
        if tag in ("input", "select", "textarea"):
            assert "label" in around or "aria-label" in attributes, attributes


def test_its_script_parses(tmp_path):
    command = shutil.which("node") or shutil.which("nodejs")
    if command is None:
        pytest.skip("no node to parse the page's script; `pytest -m slow` asks a browser")
    assert SCRIPT
    (tmp_path / "page.js").write_text(SCRIPT[1])
    ran = subprocess.run([command, "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(opened: Browser) -> Iterator[Browser]:
    opened.show()
    opened.errors.clear()
    yield opened
    assert opened.errors == []


def joined(name: str) -> str:
    return b"".join(text for text, _ in ANSWERS[name]).decode()


@pytest.mark.slow
def test_each_token_shows_its_probability_and_the_likeliest(browser):
    with Scripted() as server:
        visit(browser, server)
        say(browser, "sum?")
        shown = figures(browser, 0, "ended by itself")
        assert re.match(
            r"26 tokens in [\d.]+ s · [\d.]+ tokens/s · first after [\d.]+ s · prompt 12", shown
        )
        assert text(browser) == joined("sum")
        found = tokens(browser)
        assert [t["text"] for t in found] == [t.decode() for t, _ in ANSWERS["sum"]] + [""]
        assert found[-1]["kind"] == "token beyond"
        assert [t["p"] for t in found[:-1]] == [
            pytest.approx(p, abs=1e-4) for _, p in ANSWERS["sum"]
        ]
        by_p = sorted(found, key=lambda token: token["p"])
        steps = [
            (b["p"] - a["p"], b["lightness"] - a["lightness"]) for a, b in itertools.pairwise(by_p)
        ]
        assert all(x == pytest.approx(0.28 * p, abs=2e-4) for p, x in steps)

        browser.point(f"{every('.text .token')}[1]")
        assert tip(browser)[0] == ["␣sum", "61.0 %", "log -0.494", "drawn"]
        assert [row[0] for row in tip(browser)[1:]] == ["␣alpha", "␣beta", "␣gamma", "␣delta"]
        browser.point("$('message')")
        browser.wait("$('tip').hidden")


@pytest.mark.slow
def test_tokens_are_reached_by_keys(browser):
    with Scripted() as server:
        visit(browser, server)
        for number, words in enumerate(("sum?", "never mind")):
            say(browser, words)
            figures(browser, number, "ended by itself")
        focused = "document.activeElement.textContent"
        browser.press("Tab", shift=True)
        assert browser.ask(focused) == "never"
        rows = tip(browser)  # drawn without being among the five likeliest
        assert rows[0] == ["never", "0.00 %", "log -9999.000", "drawn"]
        assert [row[1] for row in rows[1:]] == ["50.0 %", "25.0 %", "12.0 %", "8.0 %", "5.0 %"]
        browser.press("Escape")
        assert browser.ask("$('tip').hidden")
        browser.press("Tab", shift=True)  # one stop for each answer
        assert browser.ask(focused) == "The"
        for key, word in (("ArrowRight", " sum"), ("End", ""), ("ArrowLeft", "."), ("Home", "The")):
            browser.press(key)
            assert browser.ask(focused) == word
        assert tip(browser)[0][:2] == ["The", "93.0 %"]


@pytest.mark.slow
def test_requests_carry_the_settings_and_the_conversation(browser):
    with Scripted() as server:
        visit(browser, server)
        say(browser, "sum?")
        figures(browser, 0, "ended")
        browser.ask("$('more').open = true")
        changes = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "7"}
        for name, value in changes.items():
            browser.ask(f"$('{name}').value = '{value}'")
        browser.click("$('system')")
        browser.type("Be brief.")
        say(browser, "sum again")
        assert "seed 7" in figures(browser, 1, "ended")
        (path, first), (_, second) = server.asked
        assert path == "/v1/chat/completions" and 0 <= first["seed"] < 2**32
        fixed = {"model": "policy", "stream": True, "stream_options": {"include_usage": True}}
        fixed |= {"logprobs": True, "top_logprobs": 5}
        defaults = {"temperature": 1, "top_p": 1, "max_tokens": 512, "seed": first["seed"]}
        asked = {"role": "user", "content": "sum?"}
        assert first == {**fixed, **defaults, "messages": [asked]}
        told = [{"role": "system", "content": "Be brief."}, asked]
        told += [{"role": "assistant", "content": joined("sum")}]
        told += [{"role": "user", "content": "sum again"}]
        assert second == {**fixed, **{k: float(v) for k, v in changes.items()}, "messages": told}

        browser.ask("$('top_p').value = '2'")
        say(browser, "refused")
        assert len(server.asked) == 2 and browser.ask("$('message').value") == "refused"
        browser.click("$('new')")
        assert browser.ask(f"{every('.user, .answer')}.length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_characters_of_several_tokens_are_whole(browser, mode):
    with Scripted() as server:
        visit(browser, server)
        browser.ask(f"$('mode').value = '{mode}'")
        say(browser, "bytes")
        figures(browser, 0, "ended")
        assert text(browser) == "café 😀!"
        found = [(t["text"], t["kind"]) for t in tokens(browser)]
        whole, part = "token", "token part"
        assert found[:3] == [("caf", whole), ("", part), ("é ", whole)]
        assert found[3:] == [("", part), ("😀!", whole), ("", "token beyond")]
        browser.point(f"{every('.text .token')}[1]")
        assert tip(browser)[0][0] == ("bytes c3" if mode == "chat" else "\ufffd")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_a_hostile_answer_is_text(browser, mode):
    with Scripted((HOSTILE,)) as server:
        visit(browser, server)
        browser.ask(f"$('mode').value = '{mode}'")
        say(browser, f"hostile {HOSTILE}")
        figures(browser, 0, "ended")
        assert text(browser) == HOSTILE
        assert browser.ask("document.querySelector('.model').textContent") == HOSTILE
        browser.point("document.querySelector('.text .token')")
        assert tip(browser)[0][0] == "<img␣sr"
        assert browser.ask(f"{every('img, body script')}.length") == 1  # its own
        assert browser.ask("document.title") == "Talk to the policy"
        # The browser itself refuses what the page never does.
        refused = "try { document.body.innerHTML = '<b>'; 'made' } catch (error) { error.name }"
        assert browser.ask(refused) == "TypeError"


@pytest.mark.slow
def test_two_models_side_by_side(browser):
    with Scripted(("policy-100", "policy-200"), pause=0.05) as server:
        visit(browser, server)
        browser.ask("$('other').value = 'policy-200'")
        say(browser, "sum?")
        begun = f"{every('.text')}.filter((e) => e.children.length > 3).length"
        browser.wait(f"running && {begun} === 2")  # neither has waited for the other
        for number in (0, 1):
            figures(browser, number, "ended by itself")
            assert text(browser, number) == joined("sum")
        left, right = (tokens(browser, number)[:-1] for number in (0, 1))
        assert all(
            b["p"] == pytest.approx(a["p"] ** 3, abs=2e-4) for a, b in zip(left, right, strict=True)
        )
        boxes = browser.ask(f"{every('.answer')}.map((e) => e.getBoundingClientRect().y)")
        assert boxes[0] == boxes[1]
        first, second = sorted((body for _, body in server.asked), key=lambda body: body["model"])
        assert (first["model"], second["model"]) == ("policy-100", "policy-200")
        assert {**first, "model": ""} == {**second, "model": ""}
        assert browser.ask("$('model').disabled && $('other').disabled")
        say(browser, "away")
        assert problem(browser).startswith("The connection to the server at 127.0.0.1")


@pytest.mark.slow
def test_an_answer_is_stopped_and_the_talk_goes_on(browser):
    with Scripted() as server:
        visit(browser, server)
        say(browser, "endless")
        browser.wait(f"{every('.text .token')}.length > 6")
        assert browser.ask("$('send').hidden")
        browser.click("$('stop')")
        assert "stopped" in figures(browser, 0, "stopped")
        assert server.was_left.wait(10)
        assert browser.ask("$('stop').hidden && $('problem').hidden")
        said = text(browser)
        assert said and joined("sum") * 2000 != said and (joined("sum") * 9).startswith(said)
        say(browser, "sum?")
        figures(browser, 1, "ended by itself")
        told = server.asked[-1][1]["messages"]
        assert told[1] == {"role": "assistant", "content": said}

        say(browser, "endless")
        browser.wait(f"{every('.text')}[2]?.children.length > 2")
        server.was_left.clear()
        browser.click("$('new')")
        assert server.was_left.wait(10)
        say(browser, "sum?")
        figures(browser, 0, "ended by itself")
        assert len(server.asked[-1][1]["messages"]) == 1


@pytest.mark.slow
def test_what_failed_is_told_and_tried_again(browser):
    with Scripted() as server:
        visit(browser, server)
        say(browser, "busy")
        assert problem(browser) == "512 requests are waiting."
        assert figures(browser, 0, "failed").startswith("failed")
        browser.click("$('again')")
        figures(browser, 0, "ended by itself")
        assert browser.ask("$('problem').hidden && $('plain').hidden && $('lock').hidden")
        assert server.asked[0] == server.asked[1]  # the seed too
        for words, told in (
            ("trouble", "The logits are not finite."),
            ("broken", "The answer broke off."),
            ("away", f"The connection to the server at {server.url[7:]} failed."),
        ):
            say(browser, words)
            browser.wait("!running")
            assert problem(browser) == told
        say(browser, "sum?")
        figures(browser, 4, "ended by itself")
        roles = [message["role"] for message in server.asked[-1][1]["messages"]]
        assert roles == ["user", "assistant"] * 3 + ["user"]  # without what was never answered
    browser.click("$('new')")  # now there is no server at all
    assert problem(browser).startswith("The connection to the server")


@pytest.mark.slow
def test_a_model_without_a_chat_template_completes(browser):
    with Scripted(("base",)) as server:
        visit(browser, server)
        say(browser, "One and one")
        assert problem(browser) == "The model base has no chat template."
        browser.click("$('plain')")
        figures(browser, 0, "ended by itself")
        assert text(browser) == joined("sum")
        assert len(tokens(browser)) == len(ANSWERS["sum"]) + 1
        browser.point(
            f"{every('.text .token')}[1]"
        )  # this route names the drawn one beside the five
        assert [row[0] for row in tip(browser)] == ["␣sum", "␣alpha", "␣beta", "␣gamma", "␣delta"]
        say(browser, " and on")
        figures(browser, 1, "ended by itself")
        path, body = server.asked[-1]
        assert path == "/v1/completions" and body["logprobs"] == 5
        assert body["prompt"] == f"One and one{joined('sum')} and on"
        assert not browser.ask("$('instructions').checkVisibility()")


@pytest.mark.slow
def test_a_key_is_asked_for_and_forgotten(browser):
    with Scripted(key="open sesame") as server:
        for _ in range(2):  # also after a reload
            browser.open(server.url)
            assert problem(browser).startswith("The server asks for a key.")
            assert browser.ask("document.activeElement.id") == "key"
            refused = server.refused
            browser.type("wrong")
            browser.press("Enter")
            browser.wait("document.activeElement.id === 'key'")  # asked for again
            assert server.refused == refused + 1
            browser.type("open sesame")
            browser.press("Enter")
            browser.wait("$('model').value && $('problem').hidden")
            say(browser, "sum?")
            figures(browser, 0, "ended by itself")
            kept = browser.ask("[localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]


# The sRGB luminance of a colour, by the browser's own conversion.
LUMINANCE = """(color) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  const linear = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_is_even_and_readable(browser, dark):
    with Scripted() as server:
        browser.show(dark=dark)
        visit(browser, server)
        found = browser.ask(
            f"{every('#legend .token')}.map((e) => getComputedStyle(e)).map((style) =>"
            f"[style.backgroundColor, ...[style.backgroundColor, style.color].map({LUMINANCE})])"
        )
        lightness = [float(color[len("oklab(") :].split()[0]) for color, _, _ in found]
        steps = [b - a for a, b in itertools.pairwise(lightness)]
        assert all(step == pytest.approx(steps[0], abs=1e-3) for step in steps)
        assert abs(steps[0]) > 0.06 and (steps[0] < 0) is dark  # told apart without their hue
        for color, ground, letters in found:
            low, high = sorted((ground, letters))
            assert (high + 0.05) / (low + 0.05) >= 4.5, color


@pytest.mark.slow
def test_a_narrow_window_holds_all(browser, tmp_path):
    with Scripted(("policy-100", "policy-200")) as server:
        browser.show(width=320, height=600)
        visit(browser, server)
        browser.ask("$('other').value = 'policy-200'")
        say(browser, "hostile " + "x" * 300)
        for number in (0, 1):
            figures(browser, number, "ended by itself")
        bottom = "getBoundingClientRect().bottom"
        ends = f"{every('.figures')}.at(-1).{bottom} - document.querySelector('main').{bottom}"
        assert -60 < browser.ask(ends) <= 0  # the end has come into sight
        browser.ask("document.querySelector('main').scrollBy(0, -150)")
        say(browser, "endless")
        browser.wait(f"{every('.text')}[3]?.children.length > 9")
        browser.click("$('stop')")
        assert -60 < browser.ask(ends) <= 0
        wide = f"{every('body *')}.filter((e) => e.getBoundingClientRect().right > innerWidth)"
        assert browser.ask(f"{wide}.map((e) => e.outerHTML.slice(0, 60))") == []
        browser.point(f"{every('.text .token')}.at(-2)")
        box = browser.ask("$('tip').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= 320 and box["bottom"] <= 600, json.dumps(box)


@contextlib.contextmanager
def routes(engine: ScriptedEngine, tokenizer: Any) -> Iterator[str]:
    """The address of the library's own server, with a key."""
    listener = listen("127.0.0.1", 0)
    server = make_server(app_of(engine, tokenizer, api_key="sesame"), 5)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_the_librarys_own_routes_answer_it(browser, mode):
    tokenizer, words = byte_tokenizer(), "hello wörld 😀\n"
    ids = tokenizer.encode(words, add_special_tokens=False)
    engine = ScriptedEngine(lambda request: [*ids, 2], block=3, window=256)
    with routes(engine, tokenizer) as url:
        browser.open(url)
        assert problem(browser).startswith("The server asks for a key.")
        browser.type("sesame")
        browser.press("Enter")
        browser.wait("$('model').value")
        browser.ask(f"$('mode').value = '{mode}'")
        say(browser, "hi")
        assert f"{len(ids) + 1} tokens in" in figures(browser, 0, "prompt .* ended by itself")
        assert text(browser) == words and browser.ask("$('problem').hidden")
        found = tokens(browser)
        expected = [math.exp(logp_of(token)) for token in (*ids, 2)]
        assert [token["p"] for token in found] == [pytest.approx(p, abs=1e-4) for p in expected]
        kinds = [token["kind"] for token in found]
        assert kinds[-1] == "token beyond" and kinds[-2] == "token break"
        assert kinds.count("token part") == 1 + 3  # bytes of ö and of the smile before their last
        browser.point(f"{every('.text .token')}[0]")
        assert [row[0] for row in tip(browser) if row[3] == "drawn"] == ["hello"]
        assert len(tip(browser)) == 3  # with the two that the engine tells
        say(browser, "more")
        figures(browser, 1, "ended by itself")
        assert len(engine.requests) == 2
        first = engine.requests[0]
        assert first.drawing and first.drawing.top == 5 and len(first.tokens) < 256
        assert words in tokenizer.decode(engine.requests[1].tokens)
