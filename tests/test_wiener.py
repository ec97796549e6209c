"""The Wiener filter of ``fine-unet``."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpmctl.config import DiffusionConfig
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.nets.wiener import BANDS, OWN_ERRORS, ROUNDING, WienerFilter, cosine_levels, from_opponent, negative_log_likelihood, noise_shares, opponent

from .conftest import batch

TIMES = torch.tensor([1, 2, 5, 20, 100, 500, 900])
NO_DIRECTION = torch.zeros(1, 3 * BANDS, 1, 1)
VERTICAL, HORIZONTAL = 2, 3


def covariances(s: Tensor, v: Tensor) -> Tensor:
    """Return S (I + v v^T) S as matrices (B, H, W, 3, 3), for s and v (B, 3, H, W)."""
    size, column = torch.diag_embed(s.permute(0, 2, 3, 1)), v.permute(0, 2, 3, 1)[..., None]
    return size @ (torch.eye(3) + column @ column.mT) @ size


def of_band(band: int) -> slice:
    """Return where the three opponent colours of a band stand."""
    return slice(3 * band, 3 * band + 3)


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
    log_error = torch.full((len(TIMES), 3 * BANDS, 64, 64), math.log(error))
    found = WienerFilter(64)(estimate.expand(len(TIMES), -1, -1, -1), log_error, NO_DIRECTION, x_t, TIMES / 1000)
    variance = error**2 * sigma**2 / (error**2 + sigma**2)
    torch.testing.assert_close((found - x0).square().mean((1, 2, 3)), variance, rtol=0.05, atol=0)


def test_the_filter_returns_the_posterior_mean_of_errors_towards_one_colour() -> None:
    """With the covariance s^2 I + u u^T in every band (u is s v), the filter is the matrix C (C + sigma^2)^-1, pixel by pixel."""
    rng, error = torch.Generator().manual_seed(0), 0.1
    estimate, u = torch.rand((1, 3, 64, 64), generator=rng), torch.tensor([0.3, -0.5, 0.2])
    x0 = estimate + error * torch.randn((1, 3, 64, 64), generator=rng) + torch.randn((1, 1, 64, 64), generator=rng) * u.view(3, 1, 1)
    x_t, sigma = noisy(x0, torch.randn((1, 3, 64, 64), generator=rng))
    log_error = torch.full((len(TIMES), 3 * BANDS, 64, 64), math.log(error))
    v = opponent(u.view(1, 3, 1, 1) / error).repeat(1, BANDS, 1, 1).expand(len(TIMES), -1, 64, 64)
    found = WienerFilter(64)(estimate.expand(len(TIMES), -1, -1, -1), log_error, v, x_t, TIMES / 1000)
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
    log_error = torch.full((1, 3 * BANDS, 64, 64), -1e30)
    log_error[:, of_band(VERTICAL)] = 10  # nothing is known of it
    found = WienerFilter(64)(torch.zeros(1, 3, 64, 64), log_error, NO_DIRECTION, signal * (line + log_sigma.exp() * noise), time)
    assert float((found - line).square().mean() / log_sigma.exp().square()) == pytest.approx(0.12 + 0.02, abs=0.03)  # noise, and the low band


def test_the_filter_corrects_only_the_bands_in_which_the_estimate_may_be_wrong() -> None:
    x_t, estimate = batch(2)[0], torch.zeros(2, 3, 64, 64)
    time = torch.zeros(2)  # no noise: x_t is x0
    for wrong, band in enumerate(WienerFilter(64).bands(x_t)):
        log_error = torch.full((2, 3 * BANDS, 64, 64), -1e30)
        log_error[:, of_band(wrong)] = 0
        torch.testing.assert_close(WienerFilter(64)(estimate, log_error, NO_DIRECTION, x_t, time + 1e-4), band, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", range(BANDS))
def test_each_band_has_its_own_direction_of_colour(wrong: int) -> None:
    x_t, estimate = batch(2)[0], torch.zeros(2, 3, 64, 64)
    band, u = WienerFilter(64).bands(x_t)[wrong], torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1)
    direction = torch.zeros(2, 3 * BANDS, 64, 64)
    direction[:, of_band(wrong)] = 1e6 * opponent(u[None])  # errors of 1 in this direction, and of 1e-6 in others
    log_error, time = torch.full((2, 3 * BANDS, 64, 64), math.log(1e-6)), torch.full((2,), 1e-4)  # hardly any noise: x_t is x0
    found = WienerFilter(64)(estimate, log_error, direction, x_t, time)
    torch.testing.assert_close(found, u * (u * band).sum(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_the_gradients_of_the_filter_are_those_of_the_matrices() -> None:
    """The written-out gradients equal autograd's through C (C + sigma^2)^-1, built as matrices, in every band and pixel."""
    rng, time = torch.Generator().manual_seed(0), torch.tensor([0.05, 0.6])
    x_t, weight = torch.randn((2, 2, 3, 64, 64), generator=rng)
    given = [0.5 * torch.randn((2, channels, 64, 64), generator=rng) for channels in (3, 3 * BANDS, 3 * BANDS)]
    filtered = WienerFilter(64)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        arguments = [value.clone().requires_grad_() for value in given]
        (function(*arguments) * weight).sum().backward()
        return [value.grad for value in arguments if value.grad is not None]

    def by_matrices(estimate: Tensor, log_error: Tensor, direction: Tensor) -> Tensor:
        signal, log_sigma = (level.view(-1, 1, 1, 1, 1) for level in cosine_levels(time))
        out, noise = estimate, (2 * log_sigma).exp() * torch.eye(3)
        for s, v, band in zip(log_error.exp().split(3, 1), direction.split(3, 1), filtered.bands(opponent(x_t / signal[..., 0] - estimate)), strict=True):
            covariance = covariances(s, v)
            found = (covariance @ torch.linalg.solve(covariance + noise, band.permute(0, 2, 3, 1)[..., None]))[..., 0]
            out = out + from_opponent(found.permute(0, 3, 1, 2))
        return out

    for found, expected in zip(gradients(lambda *values: filtered(*values, x_t, time)), gradients(by_matrices), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_noise_shares_are_those_of_white_noise() -> None:
    noise = torch.randn((40, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    for share, band in zip(noise_shares(64), WienerFilter(64).bands(noise), strict=True):
        assert band[..., 8:-8, 8:-8].square().mean().item() == pytest.approx(share, rel=0.03)


def test_the_likelihood_of_the_errors_is_that_of_a_gaussian() -> None:
    """Of the errors in each band, over the root of its noise share, with the covariance S (I + v v^T) S; without the constant."""
    rng = torch.Generator().manual_seed(0)
    estimate, x0 = torch.rand((2, 2, 3, 32, 32), generator=rng)
    log_error, direction = torch.randn((2, 2, 3 * BANDS, 32, 32), generator=rng)
    expected = torch.zeros(2)
    errors = zip(log_error.exp().split(3, 1), direction.split(3, 1), WienerFilter(32).bands(opponent(x0 - estimate)), noise_shares(32), strict=True)
    for s, v, band, share in errors:
        gaussian = torch.distributions.MultivariateNormal(torch.zeros(3), covariances(s, v))
        log_likelihood = gaussian.log_prob(band.permute(0, 2, 3, 1) / math.sqrt(share)) + 1.5 * math.log(2 * math.pi)
        expected -= log_likelihood.mean((1, 2)) / BANDS
    torch.testing.assert_close(negative_log_likelihood(estimate, log_error, direction, x0), expected, rtol=1e-4, atol=1e-4)


def test_the_likeliest_errors_are_those_with_which_the_filter_is_best() -> None:
    """For errors that are the same in all colours, s and v fitted by the likelihood alone also give the least squared error, at every noise level."""
    rng = torch.Generator().manual_seed(0)
    x0 = 0.02 * torch.randn((4, 1, 32, 32), generator=rng) + 0.01 * torch.randn((4, 3, 32, 32), generator=rng)
    zero, net, grid = torch.zeros_like(x0), WienerFilter(32), (0.004, 0.01, 0.025)
    found: dict[tuple[float, float], tuple[float, float]] = {}
    for s in grid:
        for v in (0.0, 2.0, 6.0):
            log_error, direction = torch.full((4, 3 * BANDS, 32, 32), math.log(s)), torch.zeros(4, 3 * BANDS, 32, 32)
            direction[:, ::3] = math.sqrt(3) * v  # v times s in red, green and blue
            squared = 0.0
            for time in (0.004, 0.02, 0.05):
                signal, log_sigma = (level.view(1, 1, 1, 1) for level in cosine_levels(torch.tensor([time])))
                x_t = signal * (x0 + log_sigma.exp() * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))
                squared += (net(zero, log_error, direction, x_t, torch.full((4,), time)) - x0).square().mean().item()
            found[s, v] = (negative_log_likelihood(zero, log_error, direction, x0).mean().item(), squared)
    assert min(found, key=lambda given: found[given][0]) == min(found, key=lambda given: found[given][1]) == (0.01, 2.0)


def test_opponent_colours_keep_grey_apart_and_squares_as_they_are() -> None:
    image = batch(2)[0]
    torch.testing.assert_close(opponent(image).square().sum(1), image.square().sum(1))
    torch.testing.assert_close(from_opponent(opponent(image)), image)
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert opponent(grey)[:, 1:].abs().max() < 1e-6


def test_when_sampling_the_last_estimate_leaves_room_for_the_rounding_of_the_image() -> None:
    """Where the noise is less than rounding adds, errors that rounding may have caused are not kept; in training they are, and errors towards v always."""
    rng, noise = torch.Generator().manual_seed(0), ROUNDING / 100
    estimate, x_t = torch.rand((2, 1, 3, 32, 32), generator=rng)
    time = next(time for time in (torch.tensor([k * 1e-6]) for k in range(1, 10_000)) if (2 * cosine_levels(time)[1]).exp().item() >= noise)
    signal, log_sigma = (level.item() for level in cosine_levels(time))
    noise = math.exp(2 * log_sigma)

    def kept(variance: float, net: WienerFilter, along: float = 0.0) -> Tensor:
        """Return which part of x_t is kept in each opponent colour, given s^2 and the grey part of s v."""
        direction = torch.zeros(1, 3 * BANDS, 32, 32)
        direction[:, ::3] = along / math.sqrt(variance)
        found = net(estimate, torch.full((1, 3 * BANDS, 32, 32), math.log(variance) / 2), direction, x_t, time)
        return (opponent(found - estimate) / opponent(x_t / signal - estimate)).flatten(2).median(2).values[0]

    sampling, training = WienerFilter(32).eval(), WienerFilter(32).train()
    room = ROUNDING - noise
    for variance, left in ((0.5 * ROUNDING, 0.0), (room, 0.0), (2 * ROUNDING, 2 * ROUNDING - room)):
        torch.testing.assert_close(kept(variance, sampling), torch.full((3,), left / (left + noise + room / 2)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kept(variance, training), torch.full((3,), variance / (variance + noise)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kept(0.5 * ROUNDING, sampling, along=0.1), torch.tensor([0.01 / (0.01 + noise + room / 2), 0.0, 0.0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("time", "factor"), [(0.049, 1.0), (0.051, OWN_ERRORS), (0.499, OWN_ERRORS), (0.501, 1.0)])
def test_when_sampling_errors_have_a_larger_variance_than_expected_where_edges_are_decided(time: float, factor: float) -> None:
    rng, when = torch.Generator().manual_seed(0), torch.tensor([time])
    estimate, x_t = torch.rand((2, 1, 3, 32, 32), generator=rng)
    log_error, direction = torch.rand((2, 1, 3 * BANDS, 32, 32), generator=rng) - torch.tensor([3.0, 0.5]).view(2, 1, 1, 1, 1)
    sampling, training = WienerFilter(32).eval(), WienerFilter(32).train()
    expected = training(estimate, log_error + math.log(factor) / 2, direction, x_t, when)
    torch.testing.assert_close(sampling(estimate, log_error, direction, x_t, when), expected, rtol=1e-5, atol=1e-6)
