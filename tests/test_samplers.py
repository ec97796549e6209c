"""Samplers on data with a known optimal denoiser, and compared with diffusers step by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpmctl.config import Config, SamplingConfig, settings
from ddpmctl.diffusion.denoiser import Diffusion, Guidance
from ddpmctl.diffusion.objectives import Prediction
from ddpmctl.diffusion.samplers import Frame, own_options, sampler_times
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.registry import OBJECTIVES, SAMPLERS, SCHEDULES, SPACINGS

CPU = torch.device("cpu")
# A name of --sampler and an --eta: every registered sampler, and ancestral noise where it is not the default.
SAMPLINGS = [(name, eta) for name in SAMPLERS.names() for eta in ((0.0, 0.5, 1.0) if name == "ddim" else (0.0,))]


def diffusion_of(schedule: str = "linear", **settings: object) -> Diffusion:
    # With beta up to 0.05 almost nothing of the image is left at t = T, as samplers assume.
    return Diffusion.of(Config().replace(schedule=schedule, **{"beta_2": 0.05, **settings}).diffusion)


class Gaussian(nn.Module):
    """The optimal network for pixels with the distribution N(mean, std^2)."""

    def __init__(self, diffusion: Diffusion, mean: float, std: float) -> None:
        super().__init__()
        self.diffusion, self.mean, self.std = diffusion, mean, std

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        t = (time.double() * self.diffusion.schedule.timesteps).round().long().numpy()
        signal, noise = (torch.tensor(s[t]).view(-1, 1, 1, 1) for s in (self.diffusion.schedule.signal, self.diffusion.schedule.noise))
        x = x_t.double()
        x0 = self.mean + signal * self.std**2 / (signal**2 * self.std**2 + noise**2) * (x - signal * self.mean)
        eps = (x - signal * x0) / noise
        # Every target is linear in x0 and eps, so the best output is the target at their expectations.
        return self.diffusion.objective.target(x0, eps, signal, noise).float()


def normal(shape: tuple[int, ...], seed: int = 0) -> Callable[[], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=rng)


def own(eta: float) -> dict[str, float]:
    """Return ddim's eta option if it is not the default."""
    return {"eta": eta} if eta else {}


def test_every_samplers_own_options_are_sampling_settings_with_the_samplers_default() -> None:
    for name in SAMPLERS.names():
        sampler, config = SAMPLERS.get(name), SamplingConfig()
        for option, value in own_options(sampler, config).items():
            assert inspect.signature(sampler).parameters[option].default == value, (name, option)
    assert own_options(SAMPLERS.get("ddim"), SamplingConfig(eta=0.5)) == {"eta": 0.5}
    assert own_options(SAMPLERS.get("ddpm"), SamplingConfig(eta=0.5)) == {}


def test_the_help_of_steps_names_every_samplers_default() -> None:
    (steps,) = (setting for setting in settings("sampling") if setting.name == "steps")
    for name in SAMPLERS.names():
        count = SAMPLERS.get(name).auto_steps
        assert f"{'all T' if count is None else count} for {name}" in steps.help


def sample(diffusion: Diffusion, net: nn.Module, sampler: str, eta: float, *, steps: int | None, count: int = 8, guidance: float = 0.0) -> Tensor:
    noise = normal((count, 3, 32, 32))
    denoise = diffusion.denoiser(net, torch.ones(count, 24), Guidance(guidance))
    times = sampler_times("ddpm", "even", diffusion.schedule, steps)
    frames = list(SAMPLERS.get(sampler)(denoise, noise(), times, diffusion.schedule, noise, **own(eta)))
    assert [frame.t for frame in frames] == times[1:]
    assert not any(frame.pure_noise for frame in frames)
    return frames[-1].x_t


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize(("sampler", "eta"), SAMPLINGS)
def test_samples_of_gaussian_data_are_gaussian(sampler: str, eta: float, objective: str) -> None:
    diffusion = diffusion_of(timesteps=400, objective=objective)
    images = sample(diffusion, Gaussian(diffusion, 0.3, 0.5), sampler, eta, steps=None)
    # 24,576 numbers: the mean's standard error is 0.003 and the deviation's 0.002; the rest is the steps' length
    assert images.mean().item() == pytest.approx(0.3, abs=0.015)
    assert images.std().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("dpm++2m", 20)])
def test_few_steps_are_enough_without_ancestral_noise(sampler: str, steps: int, schedule: str) -> None:
    diffusion = diffusion_of(schedule, timesteps=400, objective="v")
    images = sample(diffusion, Gaussian(diffusion, 0.3, 0.5), sampler, 0.0, steps=steps)
    assert images.mean().item() == pytest.approx(0.3, abs=0.02)
    assert images.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLINGS)
def test_samples_of_a_single_point_are_exact(sampler: str, eta: float, steps: int | None, objective: str) -> None:
    diffusion = diffusion_of("cosine", timesteps=200, objective=objective)
    images = sample(diffusion, Gaussian(diffusion, 0.3, 0.0), sampler, eta, steps=steps, count=2)
    torch.testing.assert_close(images, torch.full_like(images, 0.3), rtol=0, atol=2e-5)


def test_the_reports_sampler_leaves_the_noise_of_its_beta_0() -> None:
    diffusion = Diffusion.of(Config().diffusion)  # alpha_bar_0 = 1 - beta_0, so x at t = 0 is not wholly clean
    images = sample(diffusion, Gaussian(diffusion, 0.3, 0.0), "ddpm", 0.0, steps=None, count=4)
    assert 0 < (images - 0.3).std().item() < math.sqrt(1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_frames_contain_x0_hat(sampler: str) -> None:
    diffusion = diffusion_of(timesteps=40, beta_2=0.4)
    noise = normal((2, 3, 8, 8))
    denoise = diffusion.denoiser(Gaussian(diffusion, 0.3, 0.0), torch.ones(2, 24))
    for frame in SAMPLERS.get(sampler)(denoise, noise(), sampler_times("ddpm", "even", diffusion.schedule, 8), diffusion.schedule, noise):
        torch.testing.assert_close(frame.x0_hat, torch.full_like(frame.x0_hat, 0.3), rtol=0, atol=1e-3)


# Times


def schedule_of(name: str, timesteps: int) -> Schedule:
    return make_schedule(Config().replace(schedule=name, timesteps=timesteps).diffusion)


@given(name=st.sampled_from(SCHEDULES.names()), spacing=st.sampled_from(SPACINGS.names()), timesteps=st.integers(2, 1_000), data=st.data())
def test_every_spacing_strictly_decreases_from_T_to_0(name: str, spacing: str, timesteps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, min(timesteps, 300)))
    times = sampler_times("dpm++2m", spacing, schedule_of(name, timesteps), steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (timesteps, 0)
    assert all(isinstance(t, int) for t in times)
    assert np.diff(times).max() <= -1


@given(timesteps=st.integers(2, 1_000), data=st.data())
def test_even_times_are_even(timesteps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, min(timesteps, 300)))
    times = sampler_times("ddpm", "even", schedule_of("linear", timesteps), steps)
    assert np.abs(np.array(times) - np.linspace(timesteps, 0, steps + 1)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("spacing", "power"), [("quadratic", 2), ("cubic", 3)])
def test_spacings_by_powers_are_even_in_their_root(spacing: str, power: int) -> None:
    times = np.array(sampler_times("dpm++2m", spacing, schedule_of("cosine", 10_000), 16)) / 10_000
    np.testing.assert_allclose(times, np.linspace(1, 0, 17) ** power, atol=1.5e-4)


@pytest.mark.parametrize(("spacing", "power"), [("log-snr", None), ("karras", 1 / 7)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_snr_spacings_are_even_in_their_variable(name: str, spacing: str, power: float | None) -> None:
    # Many t, so that rounding changes the times little.
    schedule = schedule_of(name, 10_000)
    times = sampler_times("dpm++2m", spacing, schedule, 10)[1:-1]
    sigma = np.exp(-schedule.log_snr[times] / 2)
    scale = np.log(sigma) if power is None else sigma**power
    gaps = -np.diff(scale)
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.05)


@given(timesteps=st.integers(2, 1_000), more=st.integers(0, 100), spacing=st.sampled_from(SPACINGS.names()))
def test_T_steps_or_more_visit_every_t(timesteps: int, more: int, spacing: str) -> None:
    schedule = schedule_of("linear", timesteps)
    assert sampler_times("dpm++2m", spacing, schedule, timesteps + more) == list(range(timesteps, -1, -1))


def test_auto_is_every_t_for_ddpm_and_few_steps_for_the_others() -> None:
    schedule = schedule_of("linear", 400)
    counts = {name: len(sampler_times(name, "even", schedule, None)) - 1 for name in SAMPLERS.names()}
    assert counts.pop("ddpm") == 400
    assert all(count <= 50 for count in counts.values())


# Guidance


class ConditionalNet(nn.Module):
    """Returns different outputs with and without labels; counts its images."""

    def __init__(self, conditional: Tensor, unconditional: Tensor) -> None:
        super().__init__()
        self.conditional, self.unconditional = conditional, unconditional
        self.evaluations = self.without_labels = 0

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        shown = labels.any(1)
        assert len(x_t) == len(labels) == len(time)
        self.evaluations += len(x_t)
        self.without_labels += int((~shown).sum())
        return torch.where(shown.view(-1, 1, 1, 1), self.conditional, self.unconditional)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guidance_is_eq_6_of_ho_and_salimans(w: float, objective: str) -> None:
    diffusion, rng = diffusion_of(objective=objective), torch.Generator().manual_seed(1)
    x_t, conditional, unconditional = torch.randn((3, 5, 3, 8, 8), generator=rng)
    net = ConditionalNet(conditional[0], unconditional[0])
    labels = torch.eye(5, 24)
    guided = diffusion.denoiser(net, labels, Guidance(w))(x_t, 250)
    assert net.evaluations == (10 if w else 5)
    assert net.without_labels == (5 if w else 0)

    signal, noise = float(diffusion.schedule.signal[250]), float(diffusion.schedule.noise[250])
    eps_c, eps_u = (diffusion.objective.prediction(out[:1].expand_as(x_t), x_t, signal, noise).eps for out in (conditional, unconditional))
    eps = (1 + w) * eps_c - w * eps_u
    torch.testing.assert_close(guided.eps, eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided.x0, (x_t - noise * eps) / signal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("time", "guided"), [(249, False), (250, True), (300, True), (350, True), (351, False)])
def test_guidance_is_applied_only_in_its_interval(time: int, guided: bool) -> None:
    diffusion, labels = diffusion_of(timesteps=1000), torch.eye(2, 24)
    net = ConditionalNet(torch.ones(3, 8, 8), torch.zeros(3, 8, 8))
    found = diffusion.denoiser(net, labels, Guidance(2.0, 0.25, 0.35))(torch.zeros(2, 3, 8, 8), time)
    assert found.eps.mean().item() == pytest.approx(3.0 if guided else 1.0)  # (1 + w) * 1 - w * 0
    assert net.evaluations == (4 if guided else 2)


@pytest.mark.parametrize("sampler", SAMPLERS.names())
@pytest.mark.parametrize(("guidance", "calls"), [(0.0, 1), (2.0, 2)])
def test_network_calls_per_image(sampler: str, guidance: float, calls: int) -> None:
    diffusion = diffusion_of(timesteps=30)
    net = ConditionalNet(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))
    sample(diffusion, net, sampler, 0.0, steps=6, count=2, guidance=guidance)
    assert net.evaluations == 2 * 6 * calls


# diffusers


@pytest.fixture(scope="module")
def schedulers() -> ModuleType:
    return pytest.importorskip("diffusers.schedulers")


def wave(x_t: Tensor, t: int) -> Tensor:
    """A smooth network output that depends on the position, the image and t, in x_t's precision."""
    place = torch.linspace(0, 6, 64, dtype=x_t.dtype).view(1, 1, 8, 8)
    return 0.9 * x_t + 0.3 * torch.sin(3 * x_t + place + t / 7)


def reference_schedule(name: str) -> Schedule:
    return make_schedule(Config().replace(schedule=name, timesteps=60, beta_1=1e-3, beta_2=0.2).diffusion)


def run(sampler: str, schedule: Schedule, times: list[int], eta: float = 0.0) -> tuple[Tensor, list[Tensor], Iterator[Frame]]:
    """Return the start, the noise that the sampler will draw (one for each step) and its frames, for ``wave`` as eps."""
    x, *draws = torch.randn((len(times), 2, 3, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    supply = iter(draws)

    def denoise(x_t: Tensor, t: int) -> Prediction:
        eps = wave(x_t, t)
        return Prediction((x_t - schedule.noise[t] * eps) / schedule.signal[t], eps)

    return x, draws, SAMPLERS.get(sampler)(denoise, x, times, schedule, lambda: next(supply), **own(eta))


def in_float64(scheduler: object, schedule: Schedule) -> object:
    """Give a diffusers scheduler our unrounded alpha_bar; built from our T + 1 betas, its timestep t is our index t."""
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), schedule.alpha_bar, rtol=1e-4)
    scheduler.alphas_cumprod = torch.tensor(schedule.alpha_bar)
    return scheduler


@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, 12])
def test_ddpm_equals_diffusers(schedulers: ModuleType, steps: int | None, schedule_name: str) -> None:
    schedule = reference_schedule(schedule_name)
    times = sampler_times("ddpm", "even", schedule, steps)
    theirs = schedulers.DDPMScheduler(num_train_timesteps=61, trained_betas=schedule.beta, variance_type="fixed_large", clip_sample=False)
    in_float64(theirs, schedule).set_timesteps(timesteps=times)
    x, draws, frames = run("ddpm", schedule, times)
    for t, draw, frame in zip(times[:-1], draws, frames, strict=True):
        rng = torch.Generator().manual_seed(t)
        out = theirs.step(wave(x, t), t, x, generator=rng)
        their_draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        # diffusers adds noise at t = 1 too, since it continues to t = 0; the report's z is 0 there.
        ours = draw if frame.t > 0 else torch.zeros_like(draw)
        scale = math.sqrt(1 - schedule.alpha_bar[t] / schedule.alpha_bar[frame.t])
        expected = out.prev_sample + scale * (ours - their_draw)
        torch.testing.assert_close(frame.x_t, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(frame.x0_hat, out.pred_original_sample, rtol=1e-9, atol=1e-9)
        x = expected


@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [60, 12])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_diffusers(schedulers: ModuleType, eta: float, steps: int, schedule_name: str) -> None:
    schedule = reference_schedule(schedule_name)
    times = sampler_times("ddpm", "even", schedule, steps)
    theirs = schedulers.DDIMScheduler(num_train_timesteps=61, trained_betas=schedule.beta, clip_sample=False, set_alpha_to_one=True)
    in_float64(theirs, schedule).set_timesteps(steps)  # diffusers steps by 61 // steps, which is our 60 / steps
    x, draws, frames = run("ddim", schedule, times, eta)
    for t, draw, frame in zip(times[:-1], draws, frames, strict=True):
        if frame.t == 0:
            theirs.set_timesteps(1)  # one step beyond the schedule, to alpha_bar = 1, where ours ends too
        x = theirs.step(wave(x, t), t, x, eta=eta, variance_noise=draw).prev_sample
        torch.testing.assert_close(frame.x_t, x, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # in diffusers, with NumPy 2
@pytest.mark.parametrize(("schedule_name", "objective", "prediction_type"), [("linear", "eps", "epsilon"), ("cosine", "v", "v_prediction")])
@pytest.mark.parametrize("steps", [40, 12, 5, 1])
def test_dpm_plus_plus_equals_diffusers(schedulers: ModuleType, steps: int, schedule_name: str, objective: str, prediction_type: str) -> None:
    schedule = reference_schedule(schedule_name)
    times = sampler_times("ddpm", "even", schedule, steps)
    theirs = schedulers.DPMSolverMultistepScheduler(
        num_train_timesteps=61, trained_betas=schedule.beta, solver_order=2, prediction_type=prediction_type, final_sigmas_type="zero"
    )
    with np.errstate(divide="ignore"):  # diffusers takes the log of sigma_0, which is 0 for cosine
        in_float64(theirs, schedule).set_timesteps(timesteps=times[:-1])
    assert theirs.config.algorithm_type == "dpmsolver++"

    def denoise(x_t: Tensor, t: int) -> Prediction:
        return OBJECTIVES.get(objective).prediction(wave(x_t, t), x_t, float(schedule.signal[t]), float(schedule.noise[t]))

    x = normal((2, 3, 8, 8))()  # diffusers always computes in float32
    frames = SAMPLERS.get("dpm++2m")(denoise, x, times, schedule, normal((2, 3, 8, 8)))
    for t, frame in zip(times[:-1], frames, strict=True):
        x = theirs.step(wave(x, t), t, x).prev_sample
        torch.testing.assert_close(frame.x_t, x, rtol=1e-5, atol=1e-5)
