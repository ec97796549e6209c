"""The HTML page: self-contained, escaped, and equal to the results."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ddpmctl.report.latex import write_latex
from ddpmctl.report.tables import Table

from .conftest import ddpmctl

HOSTILE = "<img src=x onerror=alert(1)>&{{ 7 * 7 }}.pth"


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text of table cells and list items."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def having(self, tag: str, kind: str) -> int:
        return sum(name == tag and kind in (attrs.get("class") or "").split() for name, attrs in self.tags)


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(next((run / "checkpoints").glob("epoch2_*.pth")), folder / HOSTILE)
    result = ddpmctl("evaluate", folder / HOSTILE, "--html", folder / "page.html", "--json", folder / "r.json")
    assert result.exit_code == 0, result.output
    return (folder / "page.html").read_text(encoding="utf-8"), json.loads((folder / "r.json").read_text())


def test_the_page_loads_no_external_resources(evaluated: tuple[str, dict[str, object]]) -> None:
    page = Reader(evaluated[0])
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "action", "data")]
    assert addresses
    assert all(value and value.startswith("data:image/") for value in addresses)
    assert not any(tag in ("link", "iframe", "object", "embed", "base", "form") for tag, _ in page.tags)
    assert not re.search(r"@import|url\(\s*['\"]?http", evaluated[0])


def test_file_names_are_escaped(evaluated: tuple[str, dict[str, object]]) -> None:
    page = Reader(evaluated[0])
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert any(HOSTILE in text for text in page.texts)
    assert "49" not in {text for text in page.texts if "alert" in text}


def test_hits_and_misses_equal_the_results(evaluated: tuple[str, dict[str, object]]) -> None:
    text, content = evaluated
    scores = content["checkpoints"][0]["scores"]  # type: ignore[index]
    page = Reader(text)
    assert page.having("div", "card") == 96
    assert page.having("div", "right") == sum(s["exact"] for s in scores.values())
    missed = sum(sum(count for name, count in s["misses"].items() if name != "extra") for s in scores.values())
    assert page.having("li", "miss") == missed
    assert page.having("li", "hit") == 72 + 84 + 96 - missed


def test_settings_and_hashes_are_on_the_page(evaluated: tuple[str, dict[str, object]]) -> None:
    text, content = evaluated
    texts = Reader(text).texts
    assert content["checkpoints"][0]["sha256"] in texts  # type: ignore[index]
    assert any(content["evaluator"]["sha256"] in part for part in texts)  # type: ignore[index]
    assert texts[texts.index("diffusion.timesteps") + 1] == "3"


def test_latex_special_characters_are_escaped(tmp_path: Path) -> None:
    write_latex(tmp_path / "t.tex", [Table("50 % & more", ["a_b", "#"], [[r"\input{x}", "$1^2~"]])])
    text = (tmp_path / "t.tex").read_text()
    assert r"50 \% \& more" in text
    assert r"a\_b & \#" in text
    assert r"\textbackslash{}input\{x\} & \$1\textasciicircum{}2\textasciitilde{} \\" in text
