"""A real browser for tests: Chromium without a window, driven by selenium."""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from npm_packages import npm_package
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

_BROWSER, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_KEYS = {"Tab": Keys.TAB, "Enter": Keys.ENTER, "ArrowDown": Keys.ARROW_DOWN}

needs_browser = pytest.mark.skipif(
    not (_BROWSER and _DRIVER), reason="no Chromium: `apt-get install chromium chromium-driver`"
)


class Tab:
    """A tab of a browser, as wide as a window may be."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, page: Path | str, width: int, height: int = 844, *, dark: bool = False) -> None:
        """Open a page, a file or an address, in a window of this size; wait until it is there."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._driver.get(page if isinstance(page, str) else page.absolute().as_uri())

    def value(self, program: str) -> Any:
        """Return the value of a program in the page, or of the promise that it is.

        A function around it, as selenium's own scripts have, would hide its declarations.
        """
        found = self._call(
            "Runtime.evaluate", expression=program, returnByValue=True, awaitPromise=True
        )
        return found["result"].get("value")

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Press a key as a user does."""
        keys = webdriver.ActionChains(self._driver)
        if ctrl:
            keys = keys.key_down(Keys.CONTROL)
        keys = keys.send_keys(_KEYS[key])
        if ctrl:
            keys = keys.key_up(Keys.CONTROL)
        keys.perform()

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        webdriver.ActionChains(self._driver).send_keys(text).perform()

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shown = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shown["data"]))

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._driver.execute_cdp_cmd(method, arguments)
        return answer


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    """Start a browser; yield a tab of it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(_BROWSER)
    for option in _OPTIONS:
        options.add_argument(option)
    # Named, so that selenium does not look for a driver to download.
    driver = webdriver.Chrome(options, webdriver.ChromeService(_DRIVER))
    try:
        yield Tab(driver)
    finally:
        driver.quit()


def axe() -> str:
    """Return the program of axe-core, which finds what a page keeps from some of its readers."""
    return (npm_package("axe-core") / "axe.min.js").read_text("utf-8")
