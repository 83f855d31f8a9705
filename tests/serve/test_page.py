"""The web page in a headless Chromium, at two widths."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from tests.pipelines import random_concept
from tests.serve.http_server import Running, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
TOKEN = "a-token-of-thirty-two-characters"
WIDE, PHONE = (1280, 900), (360, 740)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def server(small: engine.Engine, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "shipped").mkdir()
    random_concept(small).save(tmp_path / "shipped" / "kitty.safetensors")
    with running(small, tmp_path) as one:
        yield one


def _open(browser: Any, url: str, size: tuple[int, int]) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(30_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda request: errors.append(request.url) if not request.url.startswith((url, "data:")) else None
    )
    page.goto(url)
    page.wait_for_selector("#concept option >> nth=1", state="attached")
    return page, errors


def _until(page: Any, condition: Callable[[], bool]) -> None:
    """In place of the page's own polling, which its content security policy forbids."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_somebody_draws_with_a_concept(browser: Any, server: Running, size: tuple[int, int]) -> None:
    page, errors = _open(browser, server.url, size)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is beyond the edge"
    assert "on cpu in float32" in page.inner_text("#about")
    page.select_option("#concept", "kitty")
    page.click("#example")
    assert page.input_value("#prompt") == "a photo of a cat on a beach"
    page.fill("#seed", "3")
    page.fill("#count", "2")
    page.click("summary")
    page.evaluate("document.querySelector('#steps').value = 4")
    page.click("#draw")
    page.wait_for_selector(".shot >> nth=1")
    assert page.locator(".shot img").count() == 4, "each picture beside its foundation"
    assert page.evaluate("[...document.images].filter((i) => i.closest('.shot')).every((i) => i.naturalWidth > 0)")
    assert "seed 3, 4 steps, ddim, kitty at 1" in page.inner_text("#gallery")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert server.service.scheduler.counts["done"] == 1
    assert not errors
    page.close()


def test_previews_cancelling_and_errors(browser: Any, server: Running) -> None:
    page, errors = _open(browser, server.url, WIDE)
    page.fill("#prompt", "a cat")
    page.fill("#count", "4")
    page.evaluate("document.querySelector('#steps').max = 200; document.querySelector('#steps').value = 200")
    page.click("#draw")
    page.wait_for_selector("#preview:not([hidden])")
    assert page.is_disabled("#draw")
    page.click("#cancel")
    page.wait_for_selector("#cancel", state="hidden")
    _until(page, lambda: server.service.scheduler.counts["cancelled"] == 1)
    assert page.is_hidden("#error")
    page.evaluate("document.querySelector('#steps').value = 2; document.querySelector('#count').max = 99")
    page.fill("#count", "11")
    page.click("#draw")
    page.wait_for_selector("#error:not([hidden])")
    assert "images of a request must be at most 10 on this server, got 11" in page.inner_text("#error")
    assert not errors
    page.close()


def test_concepts_are_added_and_deleted(browser: Any, server: Running, small: engine.Engine, tmp_path: Path) -> None:
    random_concept(small, seed=1).save(tmp_path / "another cat.safetensors")
    page, errors = _open(browser, server.url, WIDE)
    page.set_input_files("#upload", tmp_path / "another cat.safetensors")
    _until(page, lambda: page.input_value("#concept") == "another-cat")
    page.click("#remove")
    _until(page, lambda: page.input_value("#concept") == "")
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04 and more")
    page.set_input_files("#upload", tmp_path / "bad.safetensors")
    page.wait_for_selector("#error:not([hidden])")
    assert "zip or pickle" in page.inner_text("#error")
    assert server.service.shelf.names() == ["kitty"]
    assert not errors
    page.close()


def test_a_token_is_asked_for_once(browser: Any, small: engine.Engine, tmp_path: Path) -> None:
    (tmp_path / "shipped").mkdir()
    random_concept(small).save(tmp_path / "shipped" / "kitty.safetensors")
    with running(small, tmp_path, tokens=[TOKEN]) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#login[open]")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#concept option >> nth=1", state="attached")
        page.reload()
        page.wait_for_selector("#concept option >> nth=1", state="attached")
        assert not page.is_visible("#login")
        page.close()
