"""The page at /, in a real browser; without one installed these tests are skipped."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine import AsyncRefiner
from tests.engine.server.servers import MODEL, Base, http, idle, wait_until

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser installed: none of {', '.join(NAMES)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab in which nothing may go wrong unseen."""
    page = browser.new_page(viewport={"width": 1160, "height": 760})
    page.set_default_timeout(15_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.expected_faults = 0
    yield page
    page.close()
    assert len(wrong) == page.expected_faults, wrong


def wait_for_state(page: Any, *states: str) -> None:
    page.wait_for_function("states => states.includes(document.getElementById('state').textContent)", arg=list(states))


def show_event(page: Any, number: int) -> None:
    page.evaluate(
        "n => { const at = document.getElementById('at'); at.value = n; at.dispatchEvent(new Event('input')) }", number
    )


def test_watch_an_answer_converge(page: Any, start: Callable[..., str]) -> None:
    url = start(base_url=None)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.fill("#draft", "Put the egg in cold water and boil it it for nine minutes minutes.")
    page.uncheck("#condition")
    page.click("summary")
    page.fill("#limit", "24")
    page.fill("#window", "4")
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector('.final').textContent))
            .observe(document.getElementById('answer'), {childList: true});
    }""")
    page.click("#go")
    wait_for_state(page, "converged")
    seen = [text for text in page.evaluate("window.seen") if text]
    assert len(seen) > 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    asked = {"prompt": page.input_value("#prompt"), "options": {"max_new_tokens": 24}}
    answer = http.post(f"{url}/v1/refine", json=asked).json()["text"]
    assert page.inner_text("#answer").strip() == seen[-1].strip() == answer.strip()
    assert all(request.startswith((url, "data:")) for request in requests)

    show_event(page, 2)
    assert 1 < int(page.inner_text("#step")) < 24
    assert page.inner_text("#answer .final") == seen[1].strip()
    assert page.inner_text("#answer .guess")
    assert page.locator("#answer mark").count() > 0
    colours = page.evaluate(
        "['.final', '.guess', 'mark'].map(s => getComputedStyle(document.querySelector('#answer ' + s)).backgroundColor)"
    )
    assert len(set(colours)) == 3


def test_the_base_writes_the_draft(page: Any, start: Callable[..., str], base: Base) -> None:
    page.goto(start())
    page.wait_for_selector(f"#model option[value={MODEL}]", state="attached")
    page.select_option("#model", MODEL)
    page.click("#go")
    wait_for_state(page, "converged")
    assert page.input_value("#draft") == base.text
    assert page.inner_text("#answer")


def test_stop_frees_the_engine(page: Any, start: Callable[..., str], base: Base, refiner: AsyncRefiner) -> None:
    base.held_after = 2
    page.goto(start())
    page.wait_for_selector(f"#model option[value={MODEL}]", state="attached")
    page.select_option("#model", MODEL)
    page.click("#go")
    wait_for_state(page, "drafting")
    page.click("#stop")
    wait_for_state(page, "stopped")
    wait_until(lambda: base.left_early == 1 and idle(refiner))
    base.held_after = None
    page.click("#go")
    wait_for_state(page, "converged")


def test_errors_and_a_token(page: Any, start: Callable[..., str]) -> None:
    page.goto(start(base_url=None, token="s3cret"))
    page.click("#go")
    wait_for_state(page, "failed")
    assert "token" in page.inner_text("#error")
    page.click("summary")
    page.fill("#token", "s3cret")
    page.click("#go")
    wait_for_state(page, "converged")
    assert page.is_hidden("#error")
    page.expected_faults = 2  # the browser itself tells of both 401


def test_text_is_never_markup(page: Any, start: Callable[..., str], base: Base) -> None:
    base.text = "<img src=x onerror=alert(1)> <b>bold</b> &amp; egg egg"
    page.goto(start())
    page.wait_for_selector(f"#model option[value={MODEL}]", state="attached")
    page.select_option("#model", MODEL)
    page.click("#go")
    wait_for_state(page, "converged")
    assert page.locator("#answer img, #answer b").count() == 0


def test_no_other_page_may_show_it(page: Any, start: Callable[..., str]) -> None:
    page.set_content(f"<iframe src={start(base_url=None)}></iframe>")
    framed = page.frames[1]
    assert framed.url.startswith("chrome-error:")
    assert framed.locator("#prompt").count() == 0
    page.expected_faults = 1  # the browser says that it refused


@pytest.mark.skipif("SCREENSHOT" not in os.environ, reason="makes the README's picture: SCREENSHOT=file.png")
def test_screenshot(page: Any, start: Callable[..., str]) -> None:
    page.goto(start(base_url=None))
    page.click("summary")
    page.fill("#window", "8")
    page.fill("#limit", "96")
    page.click("#go")
    wait_for_state(page, "converged")
    page.click("summary")
    for number in range(3, 9):  # one that shows everything the legend names
        show_event(page, number)
        if page.locator("#answer mark").count() and page.inner_text("#answer .guess"):
            break
    page.wait_for_timeout(400)  # until the bar stands still
    page.screenshot(path=os.environ["SCREENSHOT"], clip={"x": 0, "y": 0, "width": 1160, "height": 608})
