"""Device settings: --compile and its effect on training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from ddpmctl.config import COMPILE_MODES, Config
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import make_compute_device
from ddpmctl.training.trainer import Trainer
from tests.conftest import ddpmctl


def trainer(compile_mode: str) -> Trainer:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    labels = (rng.random((4, 24)) < 0.1).astype(np.uint8)
    config = Config().replace(net="unet", width=8, batch_size=2, optimizer="adam", precision="fp32", threads=1, compile=compile_mode)
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


def test_an_unknown_mode_is_refused_by_name() -> None:
    result = ddpmctl("train", "--compile", "fastest", "--dry-run")
    assert result.exit_code == 2
    assert all(mode in result.stderr for mode in ("--compile", *COMPILE_MODES))
