"""The report's weights in our network: same names, same eps, and file metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.registry import NETWORKS
from ddpmctl.training.trainer import make_network

from .conftest import batch
from .report_network import WIDTH, ReportNet, bare, from_data_parallel, linear_betas, periodic_betas, report_net, saved, schedule_buffers, within_a_ddpm


def test_the_reports_network_has_the_reports_size_and_names() -> None:
    with torch.device("meta"):
        ours, theirs = NETWORKS.get("context-unet")(Config().model), ReportNet(128)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 7_582_737
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name.partition(".")[0] for name in shapes} == {
        *("init_conv", "down1", "down2", "up0", "up1", "up2", "out"),
        *("timeembed1", "timeembed2", "contextembed1", "contextembed2"),
    }


@pytest.mark.parametrize("wrapped", [bare, within_a_ddpm, from_data_parallel, lambda weights: {"model": weights, "epoch": 3}])
@pytest.mark.parametrize("act", ["gelu", "relu", "elu"])
def test_the_reports_weights_give_the_reports_eps(tmp_path: Path, act: str, wrapped: Callable[..., dict[str, Tensor]]) -> None:
    theirs, given = report_net(act), batch()
    path = saved(tmp_path, wrapped(theirs.state_dict()))
    checkpoint = load_checkpoint(path, {} if act == "gelu" else {"act": act})
    assert checkpoint.foreign
    assert (checkpoint.config.model.net, checkpoint.config.model.act, checkpoint.config.model.width) == ("context-unet", act, WIDTH)
    ours = checkpoint.network()
    assert not ours.training
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-5, atol=1e-5)


def test_the_wrong_activation_gives_another_eps(tmp_path: Path) -> None:
    theirs, given = report_net("relu"), batch()
    with torch.no_grad():
        assert (load_checkpoint(saved(tmp_path, theirs.state_dict())).network()(*given) - theirs(*given)).abs().max() > 1e-3


@pytest.mark.parametrize("buffer", ["alphabar_t", "alpha_bar_t"])
@pytest.mark.parametrize("timesteps", [400, 1000])
@pytest.mark.parametrize(("schedule", "betas"), [("linear", linear_betas), ("cosine-periodic", periodic_betas)])
def test_the_schedule_is_detected_from_its_buffer(tmp_path: Path, schedule: str, betas: Callable[[int], Tensor], timesteps: int, buffer: str) -> None:
    buffers = schedule_buffers(betas(timesteps))
    buffers[buffer] = buffers.pop("alphabar_t")
    weights = {f"nn_model.{name}": value for name, value in report_net().state_dict().items()}
    diffusion = load_checkpoint(saved(tmp_path, {**buffers, **weights})).config.diffusion
    assert (diffusion.schedule, diffusion.timesteps) == (schedule, timesteps)


@pytest.mark.parametrize("stored", [Tensor.double, lambda bar: torch.cat((torch.zeros(3), bar))[3:]], ids=["float64", "part of a larger tensor"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_schedule_is_detected_in_every_form_of_its_buffer(tmp_path: Path, stored: Callable[[Tensor], Tensor], prefix: str) -> None:
    buffers = schedule_buffers(periodic_betas(20))
    buffers["alphabar_t"] = stored(buffers["alphabar_t"])
    content = {**buffers, **{f"nn_model.{name}": value for name, value in report_net().state_dict().items()}}
    path = saved(tmp_path, {f"{prefix}{name}": value for name, value in content.items()})
    diffusion = load_checkpoint(path).config.diffusion
    assert (diffusion.schedule, diffusion.timesteps) == ("cosine-periodic", 20)


def test_assumed_settings_override_the_reports(tmp_path: Path) -> None:
    path = saved(tmp_path, report_net().state_dict())
    assert load_checkpoint(path).config == Config().replace(width=WIDTH)
    assumed = {"schedule": "cosine-periodic", "timesteps": 300, "period": 25.0}
    assert load_checkpoint(path, assumed).config == Config().replace(width=WIDTH, **assumed)


def test_the_reports_file_names_are_parsed(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path, report_net().state_dict(), "epoch315_0.625_0.6190476190476191.pth"))
    assert checkpoint.epoch == 315
    assert checkpoint.recorded == {"test": 0.625, "new_test": 0.6190476190476191}


def test_assumptions_do_not_override_the_settings_of_our_checkpoints(tmp_path: Path) -> None:
    config = Config().replace(net="unet", act="silu", width=8, schedule="cosine", objective="v", epochs=None, minutes=3.5, seed=2**63 - 1)
    net, given = make_network(config).eval(), batch()
    save_checkpoint(tmp_path / "own.pth", config, net.state_dict(), epoch=7, loss=0.25, scores={"test": {"accuracy": 0.5}})
    checkpoint = load_checkpoint(tmp_path / "own.pth", {"act": "relu"})
    assert not checkpoint.foreign
    assert checkpoint.config == config
    assert (checkpoint.epoch, checkpoint.loss, checkpoint.recorded) == (7, 0.25, {"test": 0.5})
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.network()(*given), net(*given), rtol=1e-5, atol=1e-5)
