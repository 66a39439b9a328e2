"""The board in a real browser, at desktop and phone width: the list, a run that goes on live, a report, a change, the key."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from apprentice.run.fence import FenceEntry, FenceLog, Holder
from apprentice.storage import Folder

pytestmark = pytest.mark.browser
PATIENCE_MS = 30_000.0
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def running_board(storage: Path, *options: str) -> Iterator[str]:
    """The address of `apprentice board` over `storage`."""
    program = [sys.executable, "-c", "from apprentice.cli import main; main()", "board", "--port", "0", "--storage", str(storage)]
    with subprocess.Popen([*program, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            text = ""
            while not (address := re.search(r"http://\S+:\d+", text)):
                text += next(lines)
            yield address[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, url: str, size: tuple[int, int]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    strangers: list[str] = []
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else strangers.append(request.url))
    page.on("pageerror", lambda error: strangers.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert strangers == []  # nothing from elsewhere, nothing thrown


def test_every_page_fits_and_a_held_run_goes_on_live(browser: Browser, storage: Path) -> None:
    log = FenceLog(Folder.at(storage / "finished"))
    holder = Holder.here("apprentice train finished.yaml")
    assert log.add(FenceEntry(99, 99, 0, 0, holder, False, (), os.urandom(4).hex()))
    steps = storage / "finished" / "steps.jsonl"
    record = next(json.loads(line) for line in steps.read_text().splitlines() if "loss" in json.loads(line))
    with running_board(storage) as url:
        for size in (DESKTOP, PHONE):
            with opened(browser, url, size) as page:
                expect(page.get_by_role("link", name="stopped")).to_be_visible()
                page.get_by_label("Search").fill("finish")
                expect(page.get_by_role("link", name="stopped")).to_have_count(0)
                page.get_by_role("link", name="finished").click()
                expect(page.get_by_role("img", name=re.compile("^Loss, steps 1"))).to_be_visible()
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                last = record["step"] + size[0]
                with steps.open("a") as stream:
                    stream.write(json.dumps(record | {"step": last, "loss": 0.125}) + "\n")
                expect(page.get_by_text("loss 0.125")).to_be_visible()
                page.get_by_role("link", name="The report of this run").click()
                page.get_by_label("Task").select_option("moods")
                expect(page.get_by_text(re.compile("of 12 questions"))).to_be_visible()
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.long  # the rules themselves are tested without a browser
def test_a_change_is_confirmed_and_a_key_entered_by_keyboard(browser: Browser, storage: Path) -> None:
    with running_board(storage, "--key", "right") as url, opened(browser, url, DESKTOP) as page:
        for key in ("wrong", "right"):
            expect(page.get_by_label("Key", exact=True)).to_be_focused()
            page.keyboard.type(key)
            page.keyboard.press("Enter")
            if key == "wrong":
                expect(page.get_by_text("That is not the board's key.")).to_be_visible()
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name="lora"))
        row.get_by_role("button", name="Archive").click()
        expect(page.get_by_text("The run lora is archived: the list leaves it out, and no file is removed.")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        assert not (storage / "lora" / "board.json").exists()
        row.get_by_role("button", name="Archive").click()
        page.get_by_role("button", name="Confirm").click()
        expect(page.get_by_role("link", name="lora")).to_have_count(0)
        assert json.loads((storage / "lora" / "board.json").read_text())["archived"] is True
