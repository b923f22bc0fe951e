"""What a person does on the chat page and sees of it."""

from __future__ import annotations

from typing import Any

from chromium import Browser
from scripted import Scripted


def visit(browser: Browser, server: Scripted) -> None:
    browser.open(server.url)
    browser.wait("$('model').value")


def say(browser: Browser, words: str) -> None:
    browser.wait("!running")
    browser.click("$('message')")
    browser.type(words)
    browser.press("Enter")


def every(selector: str) -> str:
    """The expression of a list of elements."""
    return f"[...document.querySelectorAll('{selector}')]"


def figures(browser: Browser, number: int, pattern: str) -> str:
    """The figures under an answer, once they hold the pattern."""
    place = f"{every('.figures')}[{number}]"
    browser.wait(f"/{pattern}/.test({place}?.textContent)")
    return browser.ask(f"{place}.textContent")


def text(browser: Browser, number: int = 0) -> str:
    return browser.ask(f"{every('.text')}[{number}].textContent")


def problem(browser: Browser) -> str:
    browser.wait("!$('problem').hidden")
    return browser.ask("$('what').textContent")


def tokens(browser: Browser, number: int = 0) -> list[dict[str, Any]]:
    """The tokens of an answer: text, p, class, and the lightness of its colour."""
    return browser.ask(
        f"[...{every('.text')}[{number}].children].map((e) => ({{"
        "text: e.textContent, p: Number(e.style.getPropertyValue('--p')), kind: e.className,"
        "lightness: Number(getComputedStyle(e).backgroundColor.match(/oklab\\(([^ ]+)/)[1])}))"
    )


def tip(browser: Browser) -> list[list[str]]:
    browser.wait("!$('tip').hidden")
    return browser.ask(
        "[...$('tip').querySelectorAll('tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
