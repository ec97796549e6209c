"""The Wiener filter of ``fine-unet``."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpmctl.config import DiffusionConfig
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.nets.wiener import BANDS, ROUNDING, SAMPLING_VARIANCE, WienerFilter, cosine_levels

from .conftest import batch

TIMES = torch.tensor([1, 2, 5, 20, 100, 500, 900])
NO_SHIFT = torch.zeros(1, 3 * BANDS, 1, 1)
VERTICAL, HORIZONTAL = 2, 3


def noisy(x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t of the cosine schedule at ``TIMES``, in an added first dimension, and noise / signal."""
    schedule = make_schedule(DiffusionConfig(schedule="cosine", timesteps=1000))
    signal, noise = (torch.tensor(scale[TIMES], dtype=torch.float32).view(-1, 1, 1, 1) for scale in (schedule.signal, schedule.noise))
    return signal * x0 + noise * eps, (noise / signal).flatten()


def test_signal_and_noise_of_the_filter_are_those_of_the_cosine_schedule() -> None:
    signal, log_sigma = cosine_levels(TIMES / 1000)
    x_t, sigma = noisy(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    torch.testing.assert_close(signal, x_t.flatten(), rtol=1e-4, atol=0)
    torch.testing.assert_close(log_sigma.exp(), sigma, rtol=1e-4, atol=0)
    assert all(torch.isfinite(level).all() for level in cosine_levels(torch.ones(1))), "pure noise"


def test_the_filter_returns_the_posterior_mean_of_gaussian_errors() -> None:
    """Where each band of x0 has the same error s, the filter is the closed form for one number; its squared error is the posterior variance."""
    rng, error = torch.Generator().manual_seed(0), 0.1
    estimate = torch.rand((1, 3, 64, 64), generator=rng)
    x0 = estimate + error * torch.randn((1, 3, 64, 64), generator=rng)
    x_t, sigma = noisy(x0, torch.randn((1, 3, 64, 64), generator=rng))
    found = WienerFilter(64)(estimate.expand(len(TIMES), -1, -1, -1), torch.full((len(TIMES), BANDS, 64, 64), math.log(error)), NO_SHIFT, x_t, TIMES / 1000)
    variance = error**2 * sigma**2 / (error**2 + sigma**2)
    torch.testing.assert_close((found - x0).square().mean((1, 2, 3)), variance, rtol=0.05, atol=0)


def test_the_filter_returns_the_posterior_mean_of_errors_towards_one_colour() -> None:
    """With the covariance s^2 I + u u^T in every band, the filter is the matrix C (C + sigma^2)^-1, pixel by pixel."""
    rng, error = torch.Generator().manual_seed(0), 0.1
    estimate, u = torch.rand((1, 3, 64, 64), generator=rng), torch.tensor([0.3, -0.5, 0.2])
    x0 = estimate + error * torch.randn((1, 3, 64, 64), generator=rng) + torch.randn((1, 1, 64, 64), generator=rng) * u.view(3, 1, 1)
    x_t, sigma = noisy(x0, torch.randn((1, 3, 64, 64), generator=rng))
    log_error, shift = torch.full((len(TIMES), BANDS, 64, 64), math.log(error)), u.repeat(BANDS).view(1, 3 * BANDS, 1, 1).expand(len(TIMES), -1, 64, 64)
    found = WienerFilter(64)(estimate.expand(len(TIMES), -1, -1, -1), log_error, shift, x_t, TIMES / 1000)
    covariance = (error**2 * torch.eye(3) + torch.outer(u, u)).expand(len(TIMES), 3, 3)
    gain = covariance @ torch.linalg.inv(covariance + sigma.square().view(-1, 1, 1) * torch.eye(3))
    signal = cosine_levels(TIMES / 1000)[0].view(-1, 1, 1, 1)
    torch.testing.assert_close(found, estimate + torch.einsum("bij,bjhw->bihw", gain, x_t / signal - estimate), rtol=1e-3, atol=1e-3)
    variance = (covariance - gain @ covariance).diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close((found - x0).square().mean((1, 2, 3)), variance, rtol=0.05, atol=0)


def test_the_bands_sum_to_the_image_and_separate_vertical_from_horizontal_lines() -> None:
    image = batch(2)[0]
    torch.testing.assert_close(sum(WienerFilter(64).bands(image)), image, rtol=0, atol=1e-5)
    line = torch.zeros(1, 3, 64, 64)
    line[..., 30] = 1
    for lines, own in ((line, VERTICAL), (line.mT, HORIZONTAL)):
        bands = WienerFilter(64).bands(lines)
        torch.testing.assert_close(bands[own] + bands[-1], lines, rtol=0, atol=1e-6)  # what is left is its low band
        assert bands[own].abs().max() > 0.7


def test_of_an_uncertain_vertical_line_the_filter_takes_the_common_part_and_little_of_the_noise_of_single_pixels() -> None:
    """With the estimate wrong only along vertical lines, and noise sigma, the line is found, with an eighth of the variance of the noise."""
    line, noise = torch.zeros(1, 3, 64, 64), torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    line[..., 30], line[..., 31] = 0.5, -0.5  # an edge that lies elsewhere than estimated; its low band is small
    time = torch.tensor([0.05])
    signal, log_sigma = (level.view(1, 1, 1, 1) for level in cosine_levels(time))
    log_error = torch.full((1, BANDS, 64, 64), -1e30)
    log_error[:, VERTICAL] = 10  # nothing is known of it
    found = WienerFilter(64)(torch.zeros(1, 3, 64, 64), log_error, NO_SHIFT, signal * (line + log_sigma.exp() * noise), time)
    assert float((found - line).square().mean() / log_sigma.exp().square()) == pytest.approx(0.12 + 0.02, abs=0.03)  # noise, and the low band


def test_the_filter_corrects_only_the_bands_in_which_the_estimate_may_be_wrong() -> None:
    x_t, estimate = batch(2)[0], torch.zeros(2, 3, 64, 64)
    time = torch.zeros(2)  # no noise: x_t is x0
    for wrong, band in enumerate(WienerFilter(64).bands(x_t)):
        log_error = torch.full((2, BANDS, 64, 64), -1e30)
        log_error[:, wrong] = 0
        torch.testing.assert_close(WienerFilter(64)(estimate, log_error, NO_SHIFT, x_t, time + 1e-4), band, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", range(BANDS))
def test_each_band_has_its_own_direction_of_colour(wrong: int) -> None:
    x_t, estimate = batch(2)[0], torch.zeros(2, 3, 64, 64)
    band, u = WienerFilter(64).bands(x_t)[wrong], torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1)
    shift = torch.zeros(2, 3 * BANDS, 64, 64)
    shift[:, 3 * wrong : 3 * wrong + 3] = u
    found = WienerFilter(64)(estimate, torch.full((2, BANDS, 64, 64), -1e30), shift, x_t, torch.full((2,), 1e-4))  # hardly any noise: x_t is x0
    torch.testing.assert_close(found, u * (u * band).sum(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_the_gradients_of_the_filter_are_those_of_the_matrices() -> None:
    """The written-out gradients equal autograd's through C (C + sigma^2)^-1, built as matrices, in every band and pixel."""
    rng, time = torch.Generator().manual_seed(0), torch.tensor([0.05, 0.6])
    x_t, weight = torch.randn((2, 2, 3, 64, 64), generator=rng)
    given = [0.5 * torch.randn((2, channels, 64, 64), generator=rng) for channels in (3, BANDS, 3 * BANDS)]
    filtered = WienerFilter(64)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        arguments = [value.clone().requires_grad_() for value in given]
        (function(*arguments) * weight).sum().backward()
        return [value.grad for value in arguments if value.grad is not None]

    def by_matrices(estimate: Tensor, log_error: Tensor, shift: Tensor) -> Tensor:
        signal, log_sigma = (level.view(-1, 1, 1, 1, 1) for level in cosine_levels(time))
        out, noise = estimate, (2 * log_sigma).exp() * torch.eye(3)
        for s, u, band in zip(log_error.exp().split(1, 1), shift.split(3, 1), filtered.bands(x_t / signal[..., 0] - estimate), strict=True):
            column = u.permute(0, 2, 3, 1)[..., None]  # (B, H, W, 3, 1)
            covariance = s.permute(0, 2, 3, 1)[..., None] ** 2 * torch.eye(3) + column @ column.mT
            out = out + (covariance @ torch.linalg.solve(covariance + noise, band.permute(0, 2, 3, 1)[..., None]))[..., 0].permute(0, 3, 1, 2)
        return out

    for found, expected in zip(gradients(lambda *values: filtered(*values, x_t, time)), gradients(by_matrices), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("time", "factor"), [(0.01, 1.0), (0.1, SAMPLING_VARIANCE), (0.5, SAMPLING_VARIANCE), (0.7, 1.0)])
def test_when_sampling_the_filter_takes_the_errors_to_be_larger_than_in_training(time: float, factor: float) -> None:
    """Outside of training mode the result is that of errors with a covariance so many times as large, also with a colour."""
    rng = torch.Generator().manual_seed(0)
    estimate, x_t = torch.rand((2, 1, 3, 32, 32), generator=rng)
    log_error, shift = torch.full((1, BANDS, 32, 32), math.log(0.1)), torch.full((1, 3 * BANDS, 32, 32), 0.2)
    net, times = WienerFilter(32), torch.tensor([time])
    sampled = net.eval()(estimate, log_error, shift, x_t, times)
    torch.testing.assert_close(sampled, net.train()(estimate, log_error + math.log(factor) / 2, shift * math.sqrt(factor), x_t, times))
    further = (sampled - estimate).abs().mean() / (net(estimate, log_error, shift, x_t, times) - estimate).abs().mean()
    assert further > 1.0001 if factor > 1 else further == 1


def test_when_sampling_the_last_estimate_leaves_room_for_the_rounding_of_the_image() -> None:
    """Where the noise is less than rounding adds, the correction is that for noise of this size; in training it is not."""
    rng, s = torch.Generator().manual_seed(0), 0.003
    estimate, x_t = torch.rand((2, 1, 3, 32, 32), generator=rng)
    given, time = (torch.full((1, BANDS, 32, 32), math.log(s)), torch.zeros(1, 3 * BANDS, 32, 32), x_t), torch.tensor([1 / 16_000])
    signal, log_sigma = cosine_levels(time)
    noise = (2 * log_sigma).exp().item()
    assert noise < ROUNDING
    for net, of_size in ((WienerFilter(32).eval(), ROUNDING), (WienerFilter(32).train(), noise)):
        torch.testing.assert_close(net(estimate, *given, time), estimate + s**2 / (s**2 + of_size) * (x_t / signal - estimate), rtol=1e-4, atol=1e-5)
