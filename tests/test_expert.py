"""The expert for low noise: where it works, what trains it, and which times a batch has for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.iclevr import ICLEVR
from ddpmctl.nets.expert import LOW_NOISE, LowNoiseExpert, only_at_low_noise
from ddpmctl.nets.wiener import cosine_levels
from ddpmctl.presets import PRESETS
from ddpmctl.registry import TIME_SAMPLINGS
from ddpmctl.training.trainer import make_network
from tests.test_objectives import pair
from tests.test_training_loss import loss_of


def noised(x0: Tensor, time: Tensor, rng: torch.Generator) -> Tensor:
    signal, log_sigma = (level.view(-1, 1, 1, 1) for level in cosine_levels(time))
    return signal * (x0 + log_sigma.exp() * torch.randn(x0.shape, generator=rng))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_only_images_at_low_noise_change_and_each_as_if_it_were_alone(size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    net = make_network(Config().replace(net="fine-unet", width=8), replace(ICLEVR, size=size)).eval()
    x_t, labels, time = torch.rand((4, 3, size, size), generator=rng), torch.zeros(4, 24), torch.tensor([0.9, 0.049, 0.051, 0.002])
    with torch.inference_mode():
        before = net(x_t, labels, time)
        nn.init.normal_(net.expert.layers[-1].weight, std=0.1, generator=rng)
        after = net(x_t, labels, time)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert (after - before)[[1, 3]].abs().amax((1, 2, 3)).min() > 1e-4
        for i in range(4):
            torch.testing.assert_close(net(x_t[i : i + 1], labels[:1], time[i : i + 1])[0], after[i], rtol=1e-4, atol=1e-5)
        everywhere = torch.where((time < LOW_NOISE).view(-1, 1, 1, 1), net.expert(before, x_t, time), before)
        torch.testing.assert_close(after, everywhere, rtol=1e-4, atol=1e-5)


def test_its_error_trains_the_expert_and_nothing_else() -> None:
    loss, _ = loss_of(**{**PRESETS["quick"], "epochs": 1, "minutes": None, "width": 8, "time_mean_end": -4.0})
    net = make_network(Config().replace(net="fine-unet", width=8)).train()
    x0, _ = pair((16, 3, 64, 64), torch.float32)
    batch = loss.draw(x0, torch.ones(16, 24), torch.Generator().manual_seed(0), fraction=1.0)
    *_, by_expert, _ = net(batch.x_t, batch.labels, batch.time)
    (batch.expert_weight * F.mse_loss(by_expert, x0, reduction="none")).mean().backward()
    trained = {name for name, weight in net.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}
    assert trained == {f"expert.layers.3.{kind}" for kind in ("weight", "bias")}, "the last layer is zero at first, so those before it wait for it"
    net.zero_grad()
    loss(net, batch).backward()
    shares = {name: weight.grad.abs().max().item() for name, weight in net.named_parameters() if weight.grad is not None}
    assert shares["expert.layers.3.weight"] > 0
    assert shares["stem.weight"] > 0


def test_a_batch_without_low_noise_has_zero_gradients() -> None:
    """Data parallelism waits for the gradients of all parameters in every process."""
    net = LowNoiseExpert(16, nn.SiLU)
    x0_hat, time = torch.rand(2, 3, 16, 16), torch.tensor([0.5, 0.9])
    out = only_at_low_noise(net, x0_hat, x0_hat, time)
    assert torch.equal(out, x0_hat)
    out.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in net.parameters())


def test_it_learns_how_strong_the_grain_is_at_each_brightness() -> None:
    """Grain of one level where an image is dark, and none where it is bright: in dark parts, noise must stay; in bright ones, it must go."""
    rng = torch.Generator().manual_seed(0)
    expert = LowNoiseExpert(16, nn.SiLU)
    optimizer = torch.optim.Adam(expert.parameters(), lr=0.01)
    time = torch.full((16,), 0.003)
    sigma = cosine_levels(time)[1].exp()[0].item()
    bright = torch.tensor([-0.5, 0.5]).repeat(8).view(16, 1, 1, 1).expand(16, 3, 16, 16)

    def images() -> tuple[Tensor, Tensor]:
        x0 = bright + (bright < 0) * sigma * torch.randn(bright.shape, generator=rng)
        return x0, noised(x0, time, rng)

    for _ in range(150):
        x0, x_t = images()
        loss = F.mse_loss(expert(bright, x_t, time), x0) / sigma**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x0, x_t = images()
        error = (expert(bright, x_t, time) - x0).square().mean((1, 2, 3)) / sigma**2
    assert error[::2].mean() == pytest.approx(0.5, abs=0.06), "the posterior variance of two equal ones is half of one"
    assert error[1::2].mean() < 0.02


# Times


def times(name: str, mean: float, count: int = 20_000) -> Tensor:
    config = Config().replace(timesteps=16_000, time_mean=mean)
    return TIME_SAMPLINGS.get(name)(count, 16_000, config.training, torch.Generator().manual_seed(0)) / 16_000


def test_at_low_noise_as_many_times_are_even_in_log_t_and_the_others_stay() -> None:
    plain, low = (times(name, -2.5) for name in ("logit-normal", "logit-normal-low"))
    changed = plain < LOW_NOISE
    assert torch.equal(low[~changed], plain[~changed])
    assert (low[changed] < LOW_NOISE).all()
    octaves = torch.log2(LOW_NOISE / low[changed]).floor().long().clamp(max=6).bincount(minlength=7)  # t is rounded down
    expected = changed.sum() / 7
    assert (octaves - expected).abs().max() < 5 * expected.sqrt()
    assert torch.log2(LOW_NOISE / plain[changed]).floor().long().bincount()[0] > 2 * expected, "which is not so otherwise"


def test_the_weight_of_the_experts_error_is_one_over_the_noise_at_low_noise_only() -> None:
    loss, diffusion = loss_of(timesteps=1000, schedule="cosine", objective="x0")
    x0, _ = pair((200, 3, 8, 8), torch.float32)
    batch = loss.draw(x0, torch.ones(200, 24), torch.Generator().manual_seed(0))
    t = (batch.time * 1000).round().long().numpy()
    sigma = torch.tensor(diffusion.schedule.noise[t] / diffusion.schedule.signal[t], dtype=torch.float32)
    expected = torch.where(batch.time < LOW_NOISE, 1 / sigma, 0)
    torch.testing.assert_close(batch.expert_weight.flatten(), expected)
    assert 0 < (expected > 0).sum() < 200
