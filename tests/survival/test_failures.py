"""Unexpected errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ..conftest import ddpmctl


def test_an_unexpected_error_is_one_line_and_a_file_in_the_run_without_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(torch, "_foreach_add_", broken)
    result = ddpmctl("train", "--resume", tmp_path / "run", "--epochs", 3, "--override", "epochs")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    (file,) = (tmp_path / "run").glob("crash-*.txt")
    assert str(file) in line
    message = file.read_text()
    assert "RuntimeError: no such kernel" in message
    assert "in step" in message
    assert "tensor(" not in message
