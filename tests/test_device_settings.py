"""Device settings: --compile and its effect on training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from ddpmctl.config import COMPILE_MODES, Config
from ddpmctl.cuda_graph import CudaGraph, CudaGraphFunction
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import make_compute_device
from ddpmctl.training.trainer import Trainer
from tests.conftest import ddpmctl


def trainer(compile_mode: str, **settings: object) -> Trainer:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    labels = (rng.random((5, 24)) < 0.1).astype(np.uint8)
    chosen = {"net": "unet", "width": 8, "batch_size": 2, "optimizer": "adam", "precision": "fp32", "threads": 1, "compile": compile_mode}
    config = Config().replace(**{**chosen, **settings})
    return Trainer(config, make_compute_device(config.device), Dataset("noise", "", images, labels, {}, None))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_compiled_step_trains_the_same_weights() -> None:
    plain, compiled = trainer("none"), trainer("default")
    assert compiled.forward is not compiled.net
    for _ in range(2):
        plain.step()
        compiled.step()
    assert compiled.weights().keys() == plain.weights().keys()  # names without a compiler's prefix
    for name, value in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"net": "fine-unet", "objective": "x0", "schedule": "cosine", "label_loss": 0.03, "error_loss": 0.001, "width": 32, "optimizer": "muon"},
        {"net": "fine-unet", "objective": "x0", "schedule": "cosine", "label_loss": 0.03, "error_loss": 0.001, "precision": "bf16"},
        {"net": "context-unet"},  # with batch norm
        {"net": "unet", "micro_batch": 1},
    ],
)
def test_a_recorded_step_trains_the_same_weights(settings: dict[str, object]) -> None:
    plain, recorded = trainer("none", **settings), trainer("cuda-graph", **settings)
    assert (recorded.forward is recorded.net) == ("micro_batch" in settings)
    for _ in range(2):  # epochs of 2, 2 and 1 images: the last batch has another shape
        for _ in range(3):
            for each in (plain, recorded):
                each.step()
        for each in (plain, recorded):
            each.end_epoch(0.0)
    if isinstance(recorded.forward, CudaGraph):
        assert recorded.forward.is_recorded
    tolerance = {"rtol": 0.02, "atol": 2e-3} if settings.get("precision") == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
    for name, value in plain.weights().items():
        torch.testing.assert_close(recorded.weights()[name], value, **tolerance)  # also batch norm's statistics


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_function_is_calculated_for_the_inputs_of_each_call() -> None:
    recorded = CudaGraphFunction(lambda inputs: [x @ x.mT for x in inputs])
    for shapes in ([(2, 3), (4, 5)], [(2, 3), (4, 5)], [(6, 7)]):
        inputs = [torch.randn(shape, device="cuda") for shape in shapes]
        for found, x in zip(recorded(inputs), inputs, strict=True):
            torch.testing.assert_close(found, x @ x.mT)


def test_without_a_gpu_nothing_is_recorded() -> None:
    on_cpu = trainer("cuda-graph", device="cpu")
    assert on_cpu.forward is on_cpu.net


def test_an_unknown_mode_is_refused_by_name() -> None:
    result = ddpmctl("train", "--compile", "fastest", "--dry-run")
    assert result.exit_code == 2
    assert all(mode in result.stderr for mode in ("--compile", *COMPILE_MODES))
