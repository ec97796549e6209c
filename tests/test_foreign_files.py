"""Invalid checkpoint files are refused by name, and nothing in them is executed."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.errors import DataError, UsageError

from .report_network import report_net, saved


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


WRONG_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a shape": lambda w: w | {"up0.0.weight": torch.zeros(2, 2)},
    "a missing layer": lambda w: without(w, "out.3.bias"),
    "a missing first layer": lambda w: without(w, "init_conv.conv1.0.weight"),
    "one layer too many": lambda w: w | {"up3.weight": torch.zeros(3)},
    "other names": lambda w: {f"encoder.{name}": value for name, value in w.items()},
    "a first layer that is not a kernel": lambda w: w | {"init_conv.conv1.0.weight": torch.zeros(16)},
    "not a number": lambda w: w | {"out.3.bias": torch.full((3,), math.nan)},
    "text among the weights": lambda w: w | {"out.3.bias": "zero"},
    "a strange schedule": lambda w: {"alphabar_t": torch.linspace(1, 0, 401)} | {f"nn_model.{name}": value for name, value in w.items()},
    "no weights": lambda w: {},
    "a list": lambda w: [1, 2],
    "a tensor": lambda w: torch.zeros(3),
    "numbered": lambda w: dict(enumerate(w.values())),
    "a bare format": lambda w: {"format": "ddpmctl checkpoint 1"},
    "settings of another version": lambda w: {"format": "ddpmctl checkpoint 1", "config": {"model": {"net": "vit"}}, "known": {}, "weights": w},
    "settings that are none": lambda w: {"format": "ddpmctl checkpoint 1", "config": 3, "known": {}, "weights": w},
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, wrong: Callable[[dict[str, Tensor]], object]) -> None:
    path = saved(tmp_path, wrong(report_net().state_dict()))
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path).network()


@pytest.mark.parametrize("n_feat", [12, 4])
def test_an_invalid_width_is_a_data_error(tmp_path: Path, n_feat: int) -> None:
    kernel = torch.zeros(n_feat, 3, 3, 3)
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(saved(tmp_path, {"init_conv.conv1.0.weight": kernel}))


def test_an_invalid_assumption_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="act"):
        load_checkpoint(saved(tmp_path, report_net().state_dict()), {"act": "gellu"})


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no zip" + data, lambda data: b"\x80\x04garbage"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved(tmp_path, report_net().state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path)


def test_errors_of_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(DataError, match=tmp_path.name):
        load_checkpoint(tmp_path)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["zip", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, dump: Callable[[object, Path], object]) -> None:
    path = tmp_path / "weights.pth"
    dump({**report_net().state_dict(), "extra": Exploit(tmp_path / "broken-in")}, path)
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path)
    assert not (tmp_path / "broken-in").exists()
