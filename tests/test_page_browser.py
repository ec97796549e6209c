"""The page in a real browser: it opens without a network and without errors, sorts, filters, and fits the window in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import needs_chromium, opened
from .conftest import ddpmctl, train

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each command that writes one."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [train(folder, "--epochs", 2, "--act", act, "--seed", seed) for act in ("gelu", "relu") for seed in (0, 1)]
    files = {name: folder / f"{name}.html" for name in ("evaluate", "compare")}
    for name, options in {"evaluate": (), "compare": ("-o", folder / "c.png")}.items():
        result = ddpmctl(name, *runs, "--repeats", 2, "--html", files[name], *options)
        assert result.exit_code == 0, result.output
    files["show"] = folder / "show.html"
    result = ddpmctl("show", runs[0], "--html", files["show"], "-o", folder / "s.png")
    assert result.exit_code == 0, result.output
    return files


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, page_files: dict[str, Path]) -> Iterator[Any]:
    with opened(browser, page_files["compare"], 1100, request.param) as page:
        yield page


def test_a_click_on_a_heading_sorts_and_a_second_click_reverses(page: Any) -> None:
    table = page.locator("section", has_text="training seeds of the arm").locator("table")
    head, cells = table.locator("th button").nth(2), table.locator("tbody tr td:nth-child(3)")
    for direction in (1, -1):
        head.click()
        values = [float(text.split()[0]) for text in cells.all_inner_texts()]
        assert len(values) == 2
        assert values == sorted(values)[::direction]
    assert table.locator("th").nth(2).get_attribute("aria-sort") == "descending"


def test_the_checkbox_hides_correct_images(page: Any) -> None:
    right, wrong = page.locator("details[open] .card.right"), page.locator("details[open] .card:not(.right)")
    before = wrong.count()
    page.locator("#only-wrong").check()
    assert all(not right.nth(index).is_visible() for index in range(right.count()))
    assert before > 0
    assert all(wrong.nth(index).is_visible() for index in range(before))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize(("command", "images", "figures"), [("evaluate", 99, 3), ("compare", 99, 3), ("show", 3, 1)])
def test_nothing_is_cut_or_scrolls_sideways(
    command: str, images: int, figures: int, width: int, scheme: str, browser: Any, page_files: dict[str, Path]
) -> None:
    with opened(browser, page_files[command], width, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        cut = "[...document.querySelectorAll('.scroll, td, th, summary, li, figcaption, p, h2')].filter(part => part.scrollWidth > part.clientWidth + 1)"
        assert page.evaluate(f"{cut}.map(part => part.textContent)") == []
        assert page.evaluate("[...document.images].length") >= images
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)")
        ground = """() => [...document.querySelectorAll('picture img')].filter(image => image.currentSrc.startsWith('data:image/svg')).map(figure => {
          const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
          canvas.width = canvas.height = 8; pen.drawImage(figure, 0, 0); return pen.getImageData(1, 1, 1, 1).data[0]; })"""
        levels = page.evaluate(ground)
        assert len(levels) >= figures
        assert all(level < 40 if scheme == "dark" else level > 240 for level in levels)


def test_arms_stand_side_by_side_for_each_condition(page: Any) -> None:
    card = page.locator("details[open] .card").first
    assert card.locator("figcaption").all_inner_texts() == ["act=gelu", "act=relu"]
    left, right = (card.locator("img").nth(index).bounding_box() for index in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    settings = page.locator("section", has=page.locator("h2", has_text="settings that differ"))
    assert settings.locator("tbody").inner_text().split() == ["act", "gelu", "relu"]


def test_names_are_short_and_the_whole_path_is_their_title(page_files: dict[str, Path], browser: Any) -> None:
    with opened(browser, page_files["evaluate"], 1280, "light") as page:
        cells = page.locator("table").first.locator("tbody td:first-child")
        assert all(re.fullmatch(r"(gelu|relu)-s[01] epoch [12]", text) for text in cells.all_inner_texts())
        assert all(Path(cells.nth(index).get_attribute("title")).is_file() for index in range(8))


def test_text_has_enough_contrast(page: Any) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.1, AA) for the text and for hits and misses."""
    script = """selector => {
      const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = colour => { const [r, g, b] = rgb(colour).map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const element = document.querySelector(selector);
      let ground = element; while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
      const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); }"""
    for selector in ("body", ".note", ".card .miss", ".card .hit", ".card .extra"):
        if page.locator(selector).count():
            assert page.evaluate(script, selector) >= 4.5, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("command", ["evaluate", "compare", "show"])
def test_nothing_hinders_a_reader_with_a_disability(command: str, width: int, scheme: str, browser: Any, page_files: dict[str, Path]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with opened(browser, page_files[command], width, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        found = axe.Axe().run(page).response["violations"]
    assert [(fault["impact"], fault["id"], fault["nodes"][0]["html"][:200]) for fault in found] == []
