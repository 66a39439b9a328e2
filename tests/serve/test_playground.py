"""The page in a real browser: type, see the reply stream in, stop it, read an error; without a mouse, on a phone, in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from apprentice.serve.deployment import Endpoint

pytestmark = pytest.mark.browser
PATIENCE_MS = 60_000.0


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, endpoint: Endpoint) -> Iterator[Page]:
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    strangers: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith((endpoint.url, "data:")) else strangers.append(request.url))
    opened.on("pageerror", lambda error: strangers.append(str(error)))
    opened.goto(endpoint.url)
    yield opened
    opened.close()
    assert strangers == []  # nothing from elsewhere, nothing thrown


def stats(endpoint: Endpoint) -> dict[str, int]:
    return dict(httpx.get(f"{endpoint.url}/stats").json())


def test_a_reply_streams_in_by_keyboard_alone(page: Page, endpoint: Endpoint) -> None:
    expect(page.locator("#model")).to_have_text("tiny · layout chat · context 2048 tokens")
    expect(page.locator("#instruction")).to_be_focused()
    page.keyboard.type("Which topic is this about?")
    page.keyboard.press("Tab")
    page.keyboard.type("The goalkeeper dived.")
    page.fill("#max_tokens", "12")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#reply")).to_have_attribute("data-state", "done", timeout=PATIENCE_MS)
    asked = {"instruction": "Which topic is this about?", "input": "The goalkeeper dived.", "max_tokens": 12}
    answer = httpx.post(f"{endpoint.url}/v1/instruct", json=asked).json()
    assert page.locator("#reply").text_content() == answer["choices"][0]["text"]
    expect(page.locator("#pace")).to_have_text(re.compile(rf"^{answer['usage']['completion_tokens']} tokens · [\d.]+ tokens/s$"))
    expect(page.locator("#error")).to_be_hidden()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_a_reply_can_be_stopped(page: Page, endpoint: Endpoint, way: str) -> None:
    # The tiny model would end by itself within seconds; hold its stream open, as a slow model's is.
    page.add_init_script(
        "const send = window.fetch; window.fetch = (url, init) => send(url, init && {...init, body: init.body.replace("
        '\'"stream":true\', \'"stream":true,"ignore_eos":true\')});'
    )
    page.goto(endpoint.url)
    page.fill("#instruction", "Name three colours.")
    page.fill("#max_tokens", "1900")
    page.click("#run")
    expect(page.locator("#pace")).to_have_text(re.compile(r"tokens/s"), timeout=PATIENCE_MS)
    expect(page.locator("#run")).to_be_disabled()
    assert stats(endpoint)["running"] == 1
    page.keyboard.press("Escape") if way == "Escape" else page.click("#stop")
    expect(page.locator("#pace")).to_contain_text("stopped")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#error")).to_be_hidden()
    while stats(endpoint)["running"]:
        pass


def test_an_error_is_shown_and_goes_away(page: Page) -> None:
    page.fill("#instruction", "Name three colours.")
    page.fill("#max_tokens", "5000")
    page.click("#run")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"the reply may have 5000; at most 2048 fit together"))
    page.fill("#max_tokens", "3")
    page.click("#run")
    expect(page.locator("#reply")).to_have_attribute("data-state", "done", timeout=PATIENCE_MS)
    expect(page.locator("#error")).to_be_hidden()


def test_an_endpoint_that_is_gone_is_said(page: Page) -> None:
    page.route("**/v1/instruct", lambda route: route.abort())
    page.fill("#instruction", "Name three colours.")
    page.click("#run")
    expect(page.get_by_role("alert")).to_have_text("The endpoint cannot be reached; is it still running?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    colours = page.evaluate("[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 384 for colour in colours]
    assert light == ([False, True] if scheme == "dark" else [True, False])
    for button in ("#run", "#stop"):
        box = page.locator(button).bounding_box()
        assert box is not None
        assert box["height"] >= 44
