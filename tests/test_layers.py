"""Imports must follow the layer table of the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ddpmctl

ROOT = Path(ddpmctl.__file__).parent
# From the bottom up; a part may import its own row and earlier rows. docs/architecture.md gives the reasons.
ORDER = (
    ("config", "presets", "config_toml", "config_sources", "registry", "errors", "files", "iclevr", "task", "label_lists", "progress", "grids", "memory"),
    ("diffusion", "nets", "statistics", "device", "cuda_graph", "distributed"),
    ("benchmark",),
    ("data",),
    ("checkpoints",),
    ("runs",),
    ("sampling",),
    ("evaluation",),
    ("training",),
    ("comparison",),
    ("report",),
    ("export",),
    ("interface", "__init__"),
    ("cli", "__main__"),
)
ROWS = {part: row for row, parts in enumerate(ORDER) for part in parts}
TOP = len(ORDER) - 1
PURE = {"diffusion", "nets", "statistics"}  # maths: no files
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "zipfile", "pickle", "ddpmctl.files"}
TERMINAL_MODULES = {"rich", "typer", "click"}
# Slow imports, which `ddpmctl --help` must not load.
SLOW_MODULES = {"torch", "torchvision", "matplotlib", "numpy", "PIL", "jinja2"}


class Import(NamedTuple):
    module: str
    line: int
    top: bool  # of the file, where it runs as soon as the file is imported


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """Yield every module that a file imports, also inside functions; ``package`` resolves relative imports."""
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from ddpmctl import cli` imports ddpmctl.cli; a longer name is cut when its row is looked up.
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            yield Import(name, node.lineno, id(node) in at_top)


def part_of(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def row_of(module: str) -> int:
    """Return the row of ``ddpmctl.x.y``; a name of the package itself, such as ``__version__``, is in row 0."""
    part = module.split(".")[1] if "." in module else "__init__"
    return ROWS.get(part, 0)


def violations(root: Path) -> list[str]:
    """Return every violation as ``file:line: what``."""
    found = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        part = place.parts[0].removesuffix(".py")
        if part not in ROWS:
            found.append(f"{place}:1: stands in no row")
            continue
        row, tree = ROWS[part], ast.parse(file.read_text(encoding="utf-8"))
        package = ".".join(["ddpmctl", *place.parts[:-1]])
        broken = []
        for module, line, top in imports(tree, package):
            if part_of(module, "ddpmctl") and row_of(module) > row:
                broken.append((line, f"row {row} imports {module} of row {row_of(module)}"))
            broken += [(line, f"row {row} imports {module}") for name in _never(place, part, row, top=top) if part_of(module, name)]
        if row < TOP:
            calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
            never = {"print", "input"} | ({"open"} if part in PURE else set())
            broken += [(node.lineno, f"row {row} calls {node.func.id}") for node in calls if node.func.id in never]
        found += [f"{place}:{line}: {what}" for line, what in sorted(set(broken))]
    return found


def _never(place: Path, part: str, row: int, *, top: bool) -> set[str]:
    """Return the modules that a file must not import (``top``: outside of functions)."""
    never = set() if row == TOP else set(TERMINAL_MODULES)
    if row == 0:
        never |= {"torch", "torchvision"}
    if part in PURE:
        never |= FILE_MODULES
    if row == TOP:
        never |= {"click"} | (SLOW_MODULES if top else set())
        if place != Path("cli/terminal.py"):
            never.add("rich")
    return never


def test_imports_follow_the_layer_table() -> None:
    assert violations(ROOT) == []


def test_every_module_is_in_the_layer_table() -> None:
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert parts == set(ROWS)


def planted(root: Path, place: str, text: str) -> list[str]:
    file = root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return violations(root)


@pytest.mark.parametrize(
    ("place", "text", "line"),
    [
        ("registry.py", "import ast\n\nfrom ddpmctl.nets import unet\n", 3),
        ("registry.py", "import torch\n", 1),
        ("registry.py", "def f():\n    import torch.nn as nn\n", 2),
        ("nets/unet.py", "from ddpmctl.data.folders import read_lab\n", 1),
        ("nets/unet.py", "from ..data import folders\n", 1),
        ("nets/unet.py", "from pathlib import Path\n", 1),
        ("nets/unet.py", "x = 1\nopen('x')\n", 2),
        ("diffusion/samplers.py", "from ddpmctl.files import atomic_write\n", 1),
        ("data/folders.py", "from ddpmctl import training\n", 1),
        ("data/folders.py", "import ddpmctl.training.loop\n", 1),
        ("evaluation/scores.py", "from rich.table import Table\n", 1),
        ("training/loop.py", "if True:\n    import typer\n", 2),
        ("training/loop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ddpmctl.cli.app import app\n", 3),
        ("training/loop.py", "def f():\n    print('epoch')\n", 2),
        ("report/page.py", "print\nprint()\n", 2),
        ("cli/train.py", "import typer\nfrom rich.console import Console\n", 2),
        ("cli/train.py", "import torch\n", 1),
        ("cli/terminal.py", "import click\n", 1),
        ("evaluation/scores.py", "from ddpmctl.report import tables\n", 1),
        ("evaluation/scores.py", "from ddpmctl.training.events import Evaluated\n", 1),
        ("utils.py", "", 1),
        ("helpers/x.py", "", 1),
    ],
)
def test_violations_are_reported_with_file_and_line(tmp_path: Path, place: str, text: str, line: int) -> None:
    (found,) = planted(tmp_path, place, text)
    assert found.startswith(f"{place}:{line}: ")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("config.py", "from ddpmctl.errors import UsageError\nimport math\n"),
        ("nets/unet.py", "import torch\nfrom ddpmctl.config import ModelConfig\nfrom ddpmctl.diffusion import schedules\nfrom . import activations\n"),
        ("training/loop.py", "from pathlib import Path\nfrom ddpmctl.grids import save_grid\n\nopen('x')\n"),
        ("cli/terminal.py", "from rich.console import Console\n\nprint()\n"),
        ("cli/train.py", "import typer\nfrom ddpmctl import __version__\n\ndef f():\n    import torch\n"),
    ],
)
def test_allowed_imports_are_not_reported(tmp_path: Path, place: str, text: str) -> None:
    assert planted(tmp_path, place, text) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv[0] = 'ddpmctl'\nfrom ddpmctl.cli.app import main\ntry:\n    main()\n"
        f"finally:\n    print(sorted({SLOW_MODULES} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr.strip() == "[]"
    assert "ddpmctl" in result.stdout
