"""Pages in a real browser, for tests. Needs a Chromium on the PATH and the package playwright, which ``.ci/run`` installs; skipped, and said so, elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs Chromium on the PATH (see .ci/run)")


@contextmanager
def opened(
    browser: Any,
    file: Path,
    width: int = 1000,
    scheme: str = "light",
    *,
    script: str = "",
    problems: int = 0,
    blocked: tuple[str, ...] = (),
    own: tuple[str, ...] = ("file:", "data:"),
) -> Iterator[Any]:
    """Open a page in a window of a width, without a network; at the end, nothing was loaded and nothing was wrong beyond what is expected.

    Args:
        browser: the fixture.
        file: the page.
        width: of the window, in pixels.
        scheme: "light" or "dark".
        script: runs before the page's own programs.
        problems: how many errors and warnings there will be.
        blocked: addresses that the test itself has the page ask for.
        own: beginnings of addresses that need no network.
    """
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    if script:
        context.add_init_script(script)
    page = context.new_page()
    found: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: (found.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda made: requests.append(made.url) if not made.url.startswith(own) else None)
    page.goto(file.as_uri())
    yield page
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{file.stem}-{width}-{scheme}.png"), full_page=True)
    assert tuple(requests) == blocked
    assert len(found) == problems, found
    context.close()
