"""The page in a real browser: type, see the reply stream in, stop it, read an error; chat, tasks, two models side by side, code to
copy; without a mouse, on a phone, in the dark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

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
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    strangers: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith((endpoint.url, "data:")) else strangers.append(request.url))
    opened.on("pageerror", lambda error: strangers.append(str(error)))
    opened.goto(endpoint.url)
    yield opened
    context.close()
    assert strangers == []  # nothing from elsewhere, nothing thrown


def stats(endpoint: Endpoint) -> dict[str, int]:
    return dict(httpx.get(f"{endpoint.url}/stats").json())


def written(page: Page, count: int = 1) -> None:
    expect(page.locator(".thread[data-state=done]")).to_have_count(count, timeout=PATIENCE_MS)


def set_most(page: Page, tokens: int) -> None:
    page.locator("#settings").evaluate("(settings) => (settings.open = true)")
    page.fill("#max_tokens", str(tokens))


def without_an_end(route: Route) -> None:
    """The tiny model would end by itself within seconds; its stream is held open, as a slow model's is."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))


def test_a_reply_streams_in_by_keyboard_alone(page: Page, endpoint: Endpoint) -> None:
    expect(page.locator("#model")).to_have_text("tiny · layout chat · context 2048 tokens")
    expect(page.locator("#instruction")).to_be_focused()
    page.keyboard.type("Which topic is this about?")
    page.keyboard.press("Tab")
    page.keyboard.type("The goalkeeper dived.")
    set_most(page, 12)
    page.keyboard.press("Control+Enter")
    written(page)
    request_body = {"instruction": "Which topic is this about?", "input": "The goalkeeper dived.", "max_tokens": 12}
    answer = httpx.post(f"{endpoint.url}/v1/instruct", json=request_body).json()
    assert page.locator(".reply").text_content() == answer["choices"][0]["text"]
    expect(page.locator(".pace")).to_have_text(re.compile(rf"^{answer['usage']['completion_tokens']} tokens · [\d.]+ tokens/s$"))
    expect(page.locator(".error")).to_be_hidden()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_a_reply_can_be_stopped(page: Page, endpoint: Endpoint, way: str) -> None:
    page.route("**/v1/instruct", without_an_end)
    page.fill("#instruction", "Name three colours.")
    set_most(page, 1900)
    page.click("#run")
    expect(page.locator(".pace")).to_have_text(re.compile(r"tokens/s"), timeout=PATIENCE_MS)
    expect(page.locator("#run")).to_be_disabled()
    assert stats(endpoint)["running"] == 1
    page.keyboard.press("Escape") if way == "Escape" else page.click("#stop")
    expect(page.locator(".pace")).to_contain_text("stopped")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator(".error")).to_be_hidden()
    while stats(endpoint)["running"]:
        pass


def test_an_error_is_shown_and_goes_away(page: Page) -> None:
    page.fill("#instruction", "Name three colours.")
    set_most(page, 5000)
    page.click("#run")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"the reply may have 5000; at most 2048 fit together"))
    set_most(page, 3)
    page.click("#run")
    written(page)
    expect(page.locator(".error")).to_be_hidden()


def test_an_endpoint_that_is_gone_is_said(page: Page) -> None:
    page.route("**/v1/instruct", lambda route: route.abort())
    page.fill("#instruction", "Name three colours.")
    page.click("#run")
    expect(page.get_by_role("alert")).to_have_text("The endpoint cannot be reached; is it still running?")


def test_a_conversation_keeps_its_turns(page: Page, endpoint: Endpoint) -> None:
    page.click("#tab-chat")
    set_most(page, 6)
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "chat" in request.url else None)
    page.fill("#system", "Be brief.")
    page.fill("#message", "Is this the film?")
    page.press("#message", "Enter")
    written(page)
    page.fill("#message", "Why?")
    page.press("#message", "Enter")
    expect(page.locator(".user")).to_have_text(["Is this the film?", "Why?"])
    written(page)
    first = page.locator(".reply").first.text_content()
    assert [turn["content"] for turn in bodies[1]["messages"]] == ["Be brief.", "Is this the film?", first, "Why?"]
    page.click("#clear")
    expect(page.locator(".user")).to_have_count(0)


def test_tabs_are_a_keyboards_too(page: Page) -> None:
    expect(page.locator("#tab-task")).to_be_visible()  # once the endpoint has listed its tasks
    page.focus("#tab-instruct")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-chat")).to_be_focused()
    expect(page.locator("#message")).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator("#tab-task")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tab", selected=True)).to_have_text(["Task"])
    unnamed = "[...document.querySelectorAll('main input, main select, main textarea')].filter(box => !box.labels.length).length"
    assert page.evaluate(unnamed) == 0


def test_a_task_is_filled_in_shown_as_the_model_reads_it_and_ranked(page: Page, endpoint: Endpoint) -> None:
    page.click("#tab-task")
    page.select_option("#task", "ag_news")
    page.fill("#field-text", "The striker scored twice.")
    page.click("#reads > summary")
    fields = {"text": "The striker scored twice."}
    wording = page.locator("#wording").input_value()
    request_body = {"task": "ag_news", "fields": fields, "template": wording}
    rendered = httpx.post(f"{endpoint.url}/v1/render", json=request_body).json()
    expect(page.locator("#reads-text")).to_have_text(rendered["text"])
    expect(page.locator("#reads-count")).to_have_text(f"{len(rendered['token_ids'])} tokens")
    page.click("#run")
    written(page)
    answer = httpx.post(f"{endpoint.url}/v1/tasks/ag_news", json={"fields": fields, "template": wording}).json()
    ranked = sorted(answer["choices"], key=lambda choice: -choice["probability"])
    assert page.locator(".choice").all_text_contents() == [choice["choice"] for choice in ranked]
    assert page.locator(".share").first.text_content() == f"{ranked[0]['probability'] * 100:.1f} %"


def test_a_task_without_choices_streams(page: Page) -> None:
    page.click("#tab-task")
    page.select_option("#task", "multi30k_en_de")
    set_most(page, 5)
    page.click("#run")
    written(page)
    expect(page.locator(".pace")).to_contain_text("token")
    expect(page.locator(".choice")).to_have_count(0)


@pytest.mark.parametrize("tab", ["instruct", "chat", "task"])
def test_what_is_copied_runs(page: Page, tab: str) -> None:
    words = """Name "three" colours – it's 'easy'."""
    page.click(f"#tab-{tab}")
    set_most(page, 4)
    if tab != "task":
        page.fill("#instruction" if tab == "instruct" else "#message", words)
        page.fill("#stop_texts", "never\nmet")
    page.click("#code > summary")
    copied = []
    for language in ("curl", "python"):
        page.click(f"#tab-{language}")
        page.click("#copy")
        expect(page.locator("#copy")).to_have_text("Copied")
        copied.append(str(page.evaluate("navigator.clipboard.readText()")))
    from_curl = subprocess.run(["bash", "-c", copied[0]], capture_output=True, text=True, check=True).stdout
    choice = json.loads(from_curl)["choices"][0] if tab != "task" else json.loads(from_curl)
    said = {"instruct": lambda: choice["text"], "chat": lambda: choice["message"]["content"], "task": lambda: choice["answer"]}[
        tab
    ]()
    from_python = subprocess.run([sys.executable, "-c", copied[1]], capture_output=True, text=True, check=True).stdout
    assert from_python == f"{said}\n"


def test_two_models_answer_side_by_side(page: Page, endpoint: Endpoint) -> None:
    expect(page.locator("#first option")).to_have_text(["tiny", "t5", "rhymes"])
    expect(page.locator(".pane")).to_have_count(1)
    page.select_option("#second", "rhymes")
    expect(page.locator(".pane h2")).to_have_text(["tiny", "rhymes"])
    page.fill("#instruction", "Name three colours.")
    set_most(page, 6)
    for first in ("tiny", "t5"):
        page.select_option("#first", first)
        page.click("#run")
        written(page, 2)
        answers = []
        for name in (first, "rhymes"):
            request_body = {"model": name, "instruction": "Name three colours.", "max_tokens": 6}
            answers.append(httpx.post(f"{endpoint.url}/v1/instruct", json=request_body).json()["choices"][0]["text"])
        assert page.locator(".reply").all_text_contents() == answers
        assert answers[0] != answers[1]
    page.click("#reads > summary")
    expect(page.locator("#reads-text")).to_have_text("Name three colours.")  # as the T5 reads it: without a chat template
    page.select_option("#second", "")
    expect(page.locator(".pane")).to_have_count(1)


@pytest.mark.parametrize("width", [360, 1280])
def test_a_key_is_asked_for_and_sent(page: Page, endpoint: Endpoint, width: int) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sk-good":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no valid API key was given."}})

    page.route("**/v1/**", guard)
    page.set_viewport_size({"width": width, "height": 740})
    page.goto(endpoint.url)
    expect(page.locator("#key")).to_be_focused()
    box, tab = page.locator(".sheet").bounding_box(), page.locator("#tab-instruct").bounding_box()
    assert box is not None
    assert tab is not None
    beside = box["x"] >= tab["x"] + tab["width"] or box["y"] + box["height"] <= tab["y"]
    assert beside, "the box covers the tabs"
    page.click("h1")  # beside the box, which goes out of the way
    expect(page.locator("#key")).to_be_hidden()
    page.click("#tab-task")
    expect(page.locator("#no-tasks")).to_contain_text("lists its tasks once it has your key")
    expect(page.locator("#pick-task")).to_be_hidden()
    expect(page.locator("#run")).to_be_disabled()
    page.click("#tab-instruct")
    page.fill("#instruction", "Name three colours.")
    set_most(page, 3)
    page.click("#run")
    expect(page.locator(".pane .error")).to_have_text("This endpoint wants an API key; enter it under “Key”.")
    page.fill("#key", "sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_have_text("This endpoint does not know the key; correct it under “Key”.")
    page.fill("#key", "sk-good")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()  # it covers nothing once it is right
    expect(page.locator(".pane .error")).to_be_hidden()
    expect(page.locator("#instruction")).to_be_focused()
    page.click("#tab-task")
    expect(page.locator("#task option")).not_to_have_count(0)
    expect(page.locator("#no-tasks")).to_be_hidden()
    page.click("#tab-instruct")
    page.click("#run")
    written(page)
    page.click("#code > summary")
    expect(page.locator("#code-text")).to_contain_text('"Authorization: Bearer $APPRENTICE_API_KEY"')
    expect(page.locator("#code-text")).not_to_contain_text("sk-good")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.click("#theme")  # from the system's to dark, then to light
    if scheme == "light":
        page.click("#theme")
    page.set_viewport_size({"width": 360, "height": 740})
    for tab in ("chat", "task", "instruct"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    colours = page.evaluate("[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 384 for colour in colours]
    assert light == ([False, True] if scheme == "dark" else [True, False])
    for button in ("#run", "#stop"):
        box = page.locator(button).bounding_box()
        assert box is not None
        assert box["height"] >= 44


def test_the_routes_are_described_without_downloads(page: Page, endpoint: Endpoint) -> None:
    page.click("nav a")
    expect(page.locator("#post--v1-instruct td.code").first).to_be_visible()
    paths = list(httpx.get(f"{endpoint.url}/openapi.json").json()["paths"])
    assert page.locator("h2 code").all_text_contents() == paths
