"""The networks, and the report's weights in them; the report's network is written out here a second time."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.engine.checkpoint import load_checkpoint, save_checkpoint
from ddpmctl.engine.trainer import make_network
from ddpmctl.errors import DataError, UsageError
from ddpmctl.nets.unet import Detail, attend_both_ways
from ddpmctl.registry import ACTIVATIONS, NETWORKS

ACTS = {"gelu": nn.GELU, "relu": nn.ReLU, "elu": nn.ELU}
WIDTH = 16


def batch(count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.rand((count, 24), generator=rng) < 0.3).float()
    return torch.randn((count, 3, 64, 64), generator=rng), labels, torch.linspace(0.2, 0.9, count)


def network(name: str, act: str, width: int = WIDTH) -> nn.Module:
    """Return a network in evaluation mode without a layer at zero, where nothing would pass."""
    net = make_network(Config().replace(net=name, act=act, width=width)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=rng))
    return net


every_network = pytest.mark.parametrize("name", NETWORKS.names())
every_act = pytest.mark.parametrize("act", ACTIVATIONS.names())


@every_network
@every_act
def test_an_image_goes_in_and_one_comes_out_and_every_weight_is_trained(name: str, act: str) -> None:
    net, (x_t, labels, time) = network(name, act), batch()
    out = net(x_t, labels, time)
    assert out.shape == x_t.shape
    assert out.dtype == torch.float32
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    idle = [n for n, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert not idle
    assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())


@every_network
@every_act
def test_image_labels_time_and_activation_matter(name: str, act: str) -> None:
    net, (x_t, labels, time) = network(name, act), batch()
    others = (x_t.flip(3), labels, time), (x_t, labels.roll(1, 1), time), (x_t, torch.zeros_like(labels), time), (x_t, labels, time / 2)
    with torch.no_grad():
        here = net(x_t, labels, time)
        for other in others:
            assert (net(*other) - here).abs().amax((1, 2, 3)).min() > 1e-4
        stranger = network(name, "gelu" if act == "tanh" else "tanh")(x_t, labels, time)
        assert (stranger - here).abs().max() > 1e-4


@every_network
def test_images_of_a_batch_do_not_look_at_each_other(name: str) -> None:
    net, (x_t, labels, time) = network(name, "gelu"), batch(3)
    with torch.no_grad():
        together = net(x_t, labels, time)
        for i in range(3):
            torch.testing.assert_close(net(x_t[i : i + 1], labels[i : i + 1], time[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_unet_looks_only_at_the_tokens_of_requested_objects() -> None:
    net, (x_t, labels, time) = network("unet", "gelu"), batch(1)
    with torch.no_grad():
        before = net(x_t, labels, time)
        for shown, changes in ((0, False), (1, True)):
            which = 1 + (labels[0] == shown).nonzero().flatten()  # token 0 stands for "no object"
            tokens = net.tokens.clone()
            net.tokens[which] += 3 * torch.randn(net.tokens[which].shape, generator=torch.Generator().manual_seed(4))
            assert ((net(x_t, labels, time) - before).abs().max() > 1e-4).item() is changes
            net.tokens.copy_(tokens)


def test_bands_of_detail_add_up_to_the_image_and_each_has_its_own_width() -> None:
    detail = Detail()
    x_t = batch(2)[0]
    torch.testing.assert_close(sum(detail(x_t)), x_t, rtol=1e-5, atol=1e-6)
    flat = torch.full((1, 3, 64, 64), 0.7)
    fine, middle, coarse = detail(flat)
    torch.testing.assert_close((fine, middle, coarse), (torch.zeros_like(flat), torch.zeros_like(flat), flat))
    point = torch.zeros(1, 3, 64, 64)
    point[:, 0, 32, 32] = 1
    once = point - detail(point)[0]
    torch.testing.assert_close(once[0, 0, 31:34, 31:34], torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16)
    assert once[0, 1:].abs().max() == 0, "colours do not mix"
    assert detail(point)[2][0, 0].count_nonzero() == 49, "the second blur reaches two pixels further"


def test_unet_with_open_gates_gives_its_input_back() -> None:
    """However little its layers know: what is good in the image need not go through them."""
    net = make_network(Config().replace(net="unet", width=8))
    given = batch(2)
    with torch.no_grad():
        assert net(*given).abs().max() == 0
        net.out[-1].bias[3 * 16 :] = 1
        torch.testing.assert_close(net(*given), given[0], rtol=1e-5, atol=1e-6)


def test_attention_both_ways_by_hand() -> None:
    """Of two heads one divides each position among the visible objects, one each object among the positions."""
    rng = torch.Generator().manual_seed(0)
    query, key_value = torch.randn((1, 5, 4), generator=rng), torch.randn((1, 3, 8), generator=rng)
    visible = torch.tensor([[True, False, True]])
    out = attend_both_ways(query, key_value, 2, visible)
    key, value = key_value[0].chunk(2, 1)
    for head, axis in ((0, 1), (1, 0)):
        part = slice(2 * head, 2 * head + 2)
        weight = (query[0, :, part] @ key[:, part].T / math.sqrt(2)).exp() * visible
        share = weight / weight.sum(axis, keepdim=True).clamp(min=1e-9) * (math.sqrt(5) if axis == 0 else 1)
        torch.testing.assert_close(out[0, :, part], share @ value[:, part])


@every_network
def test_one_training_step_lowers_the_error(name: str) -> None:
    net, given = make_network(Config().replace(net=name, width=8)), batch(4)
    target = given[1].mean(1).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = F.mse_loss(net(*given), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_network
@pytest.mark.parametrize("width", [8, 24])
def test_every_width_that_is_a_multiple_of_8_builds(name: str, width: int) -> None:
    x_t, labels, time = batch(1)
    with torch.no_grad():
        assert network(name, "relu", width)(x_t, labels, time).shape == x_t.shape


# The report's network, from the table in the design


def cba(before: int, after: int, act: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), ACTS[act]())


class Twice(nn.Module):
    def __init__(self, before: int, after: int, act: str) -> None:
        super().__init__()
        self.conv1 = cba(before, after, act)
        self.conv2 = cba(after, after, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def down(before: int, after: int, act: str) -> Chain:
    return Chain(Twice(before, after, act), nn.MaxPool2d(kernel_size=2))


def up(before: int, after: int, act: str) -> Chain:
    return Chain(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2), Twice(after, after, act), Twice(after, after, act))


def embedding(before: int, after: int) -> Chain:
    return Chain(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))


class ReportNet(nn.Module):
    def __init__(self, n_feat: int, act: str = "gelu") -> None:
        super().__init__()
        self.init_conv = Twice(3, n_feat, act)
        self.down1 = down(n_feat, n_feat, act)
        self.down2 = down(n_feat, n_feat * 2, act)
        self.timeembed1 = embedding(1, n_feat * 2)
        self.timeembed2 = embedding(1, n_feat)
        self.contextembed1 = embedding(24, n_feat * 2)
        self.contextembed2 = embedding(24, n_feat)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(n_feat * 2, n_feat * 2, kernel_size=8, stride=8), nn.GroupNorm(8, n_feat * 2), nn.ReLU())
        self.up1 = up(n_feat * 4, n_feat, act)
        self.up2 = up(n_feat * 2, n_feat, act)
        self.out = nn.Sequential(
            nn.Conv2d(n_feat * 2, n_feat, kernel_size=3, padding=1), nn.GroupNorm(8, n_feat), nn.ReLU(), nn.Conv2d(n_feat, 3, kernel_size=3, padding=1)
        )

    def forward(self, x_t: Tensor, c: Tensor, t: Tensor) -> Tensor:
        batch_size = x_t.shape[0]
        first = self.init_conv.conv1(x_t)  # 3 channels are not n_feat: the residual starts after the first layer
        x = (first + self.init_conv.conv2(first)) / 1.414
        d1 = self.down1(x)
        d2 = self.down2(d1)
        hidden = F.gelu(F.avg_pool2d(d2, 7))
        c1, c2 = (e(c).reshape(batch_size, -1, 1, 1) for e in (self.contextembed1, self.contextembed2))
        t1, t2 = (e(t.reshape(batch_size, 1)).reshape(batch_size, -1, 1, 1) for e in (self.timeembed1, self.timeembed2))
        u1 = self.up1(torch.cat([c1 * self.up0(hidden) + t1, d2], dim=1))
        u2 = self.up2(torch.cat([c2 * u1 + t2, d1], dim=1))
        return self.out(torch.cat([u2, x], dim=1))


def report_net(act: str = "gelu", n_feat: int = WIDTH) -> ReportNet:
    """Return it as after some training: every layer's signal has some size, so that each one shows in the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ReportNet(n_feat, act)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight.mul_(4 if "embed" in name else 1)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            net.train()(*batch(8, seed=9))  # leaves the statistics of a batch in every batch norm
    return net.eval()


def bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


def within_a_ddpm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**schedule_buffers(linear_betas(400)), **{f"nn_model.{name}": value for name, value in weights.items()}}


def from_data_parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in within_a_ddpm(weights).items()}


def linear_betas(timesteps: int) -> Tensor:
    return (0.02 - 1e-4) * torch.arange(timesteps + 1, dtype=torch.float32) / timesteps + 1e-4


def periodic_betas(timesteps: int) -> Tensor:
    return (0.02 - 1e-4) / 2 * torch.cos(2 * math.pi * torch.arange(timesteps + 1, dtype=torch.float32) / 50) + (0.02 + 1e-4) / 2


def schedule_buffers(beta: Tensor) -> dict[str, Tensor]:
    alphabar = torch.cumsum(torch.log(1 - beta), dim=0).exp()
    return {"sqrt_beta_t": beta.sqrt(), "alpha_t": 1 - beta, "alphabar_t": alphabar, "sqrtab": alphabar.sqrt(), "sqrtmab": (1 - alphabar).sqrt()}


def saved(folder: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


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
def test_the_schedule_is_known_by_its_buffer(tmp_path: Path, schedule: str, betas: Callable[[int], Tensor], timesteps: int, buffer: str) -> None:
    buffers = schedule_buffers(betas(timesteps))
    buffers[buffer] = buffers.pop("alphabar_t")
    weights = {f"nn_model.{name}": value for name, value in report_net().state_dict().items()}
    diffusion = load_checkpoint(saved(tmp_path, {**buffers, **weights})).config.diffusion
    assert (diffusion.schedule, diffusion.timesteps) == (schedule, timesteps)


def test_settings_that_are_assumed_win_over_the_reports(tmp_path: Path) -> None:
    path = saved(tmp_path, report_net().state_dict())
    assert load_checkpoint(path).config == Config().replace(width=WIDTH)
    assumed = {"schedule": "cosine-periodic", "timesteps": 300, "period": 25.0}
    assert load_checkpoint(path, assumed).config == Config().replace(width=WIDTH, **assumed)


def test_what_the_reports_file_names_say_is_read(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path, report_net().state_dict(), "epoch315_0.625_0.6190476190476191.pth"))
    assert checkpoint.epoch == 315
    assert checkpoint.recorded == {"test": 0.625, "new_test": 0.6190476190476191}


def test_our_checkpoint_carries_its_settings_and_nothing_can_be_assumed_over_them(tmp_path: Path) -> None:
    config = Config().replace(net="unet", act="silu", width=8, schedule="cosine", objective="v", epochs=None, minutes=3.5, seed=2**63 - 1)
    net, given = make_network(config).eval(), batch()
    save_checkpoint(tmp_path / "own.pth", config, net.state_dict(), epoch=7, loss=0.25, scores={"test": {"accuracy": 0.5}})
    checkpoint = load_checkpoint(tmp_path / "own.pth", {"act": "relu"})
    assert not checkpoint.foreign
    assert checkpoint.config == config
    assert (checkpoint.epoch, checkpoint.loss, checkpoint.recorded) == (7, 0.25, {"test": 0.5})
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.network()(*given), net(*given), rtol=1e-5, atol=1e-5)


# Files that are none


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


WRONG_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a shape": lambda w: w | {"up0.0.weight": torch.zeros(2, 2)},
    "a missing layer": lambda w: without(w, "out.3.bias"),
    "a missing first layer": lambda w: without(w, "init_conv.conv1.0.weight"),
    "one layer too many": lambda w: w | {"up3.weight": torch.zeros(3)},
    "other names": lambda w: {f"encoder.{name}": value for name, value in w.items()},
    "a first layer that is no kernel": lambda w: w | {"init_conv.conv1.0.weight": torch.zeros(16)},
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
def test_weights_of_something_else_are_refused_by_name(tmp_path: Path, wrong: Callable[[dict[str, Tensor]], object]) -> None:
    path = saved(tmp_path, wrong(report_net().state_dict()))
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path).network()


@pytest.mark.parametrize("n_feat", [12, 4])
def test_a_width_that_cannot_be_used_is_the_files_fault(tmp_path: Path, n_feat: int) -> None:
    kernel = torch.zeros(n_feat, 3, 3, 3)
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(saved(tmp_path, {"init_conv.conv1.0.weight": kernel}))


def test_an_assumption_that_cannot_be_used_is_the_persons_fault(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="act"):
        load_checkpoint(saved(tmp_path, report_net().state_dict()), {"act": "gellu"})


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no zip" + data, lambda data: b"\x80\x04garbage"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved(tmp_path, report_net().state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(DataError, match=tmp_path.name):
        load_checkpoint(tmp_path)


class Intruder:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["zip", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, dump: Callable[[object, Path], object]) -> None:
    path = tmp_path / "weights.pth"
    dump({**report_net().state_dict(), "extra": Intruder(tmp_path / "broken-in")}, path)
    with pytest.raises(DataError, match=r"weights\.pth"):
        load_checkpoint(path)
    assert not (tmp_path / "broken-in").exists()
