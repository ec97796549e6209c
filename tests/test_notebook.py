"""The notebook runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "python.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of nbclient's own libraries
def test_every_cell_runs_and_shows_what_it_is_about(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without outputs, so that changes can be read"
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    text = "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in shown)
    # How many epochs fit into its seconds depends on the machine.
    assert re.search(r"epoch \d+ \{'test': [\d.]+, 'new_test': [\d.]+\}", text)
    assert "second" in text
