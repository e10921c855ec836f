"""A headless Chromium, and a picture of the page: `python -m tests.unit.serve.browser URL OUT.png PROMPT`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1000,700",
)


def missing() -> str | None:
    """What keeps a browser from being driven here; None when nothing does."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "no chromium and chromedriver (Debian: apt install chromium chromium-driver)"
    return None


@contextmanager
def browser() -> Iterator[Any]:
    """A driver with an empty profile of its own."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            yield driver
        finally:
            driver.quit()


def fill(driver: Any, name: str, value: str) -> None:
    """Put a value into a field."""
    field = driver.find_element("id", name)
    field.clear()
    field.send_keys(value)


def wait_for_status(driver: Any, text: str) -> str:
    """The page's status line, as soon as it holds a text."""
    from selenium.webdriver.support.ui import WebDriverWait

    def status(driver: Any) -> str | None:
        found = driver.find_element("id", "status").text
        return found if text in found else None

    return str(WebDriverWait(driver, 60).until(status))


def point_at(driver: Any, element: Any) -> None:
    """Move the mouse over an element."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).move_to_element(element).perform()


def main(url: str, out: str, prompt: str) -> None:
    """Take the picture: a text has been generated, and the mouse is on one of its tokens."""
    with browser() as driver:
        driver.get(url)
        fill(driver, "prompt", prompt)
        fill(driver, "seed", "2")
        fill(driver, "max_tokens", "90")
        driver.find_element("id", "go").click()
        wait_for_status(driver, "ended by")
        tokens = driver.find_elements("css selector", "#output .token:not(.line)")
        point_at(
            driver, min(tokens[:40], key=lambda token: driver.execute_script("return arguments[0].logprob", token))
        )
        driver.save_screenshot(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
