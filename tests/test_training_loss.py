"""The training loss: weights, times, recognised objects, dropped labels and mirrored images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpmctl.config import Config, TrainingConfig
from ddpmctl.diffusion.denoiser import Diffusion, TrainingLoss
from ddpmctl.nets.wiener import BANDS, negative_log_likelihood
from ddpmctl.registry import LOSS_WEIGHTS, OBJECTIVES, TIME_SAMPLINGS
from tests.test_objectives import pair

CPU = torch.device("cpu")


class RecordingNet(nn.Module):
    """A network that records its inputs and returns a function of them."""

    def __init__(self, output: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.output = output

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        self.x_t, self.labels, self.time = x_t, labels, time
        return self.output(x_t, labels, time)


def loss_of(**settings: object) -> tuple[TrainingLoss, Diffusion]:
    config = Config().replace(**settings)
    diffusion = Diffusion.of(config.diffusion)
    return TrainingLoss(diffusion, config.training, CPU), diffusion


def steps_of(net: RecordingNet, diffusion: Diffusion) -> Tensor:
    t = net.time.double() * diffusion.schedule.timesteps
    torch.testing.assert_close(t, t.round(), rtol=0, atol=1e-3)
    return t.round().long()


@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS.names())
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_the_exact_target_has_zero_loss(objective: str, time_sampling: str) -> None:
    loss, diffusion = loss_of(objective=objective, time_sampling=time_sampling)
    x0, _ = pair((16, 3, 8, 8), torch.float32)

    def output(x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        t = (time.double() * 400).round().long().numpy()
        signal, noise = (torch.tensor(s[t], dtype=torch.float32).view(-1, 1, 1, 1) for s in (diffusion.schedule.signal, diffusion.schedule.noise))
        return diffusion.objective.target(x0, (x_t - signal * x0) / noise, signal, noise)

    net = RecordingNet(output)
    batch = loss.draw(x0, torch.ones(16, 24), torch.Generator().manual_seed(0))
    assert loss(net, batch).item() < 1e-8
    assert loss(RecordingNet(lambda *given: output(*given) + 0.5), batch).item() == pytest.approx(0.25, rel=1e-4)


def test_the_reports_loss_equals_a_manual_computation() -> None:
    loss, diffusion = loss_of()
    x0, _ = pair((6, 3, 8, 8), torch.float32)
    labels = torch.eye(6, 24)
    net = RecordingNet(lambda x_t, labels, time: 0.3 * x_t + labels.sum(1).view(-1, 1, 1, 1) * time.view(-1, 1, 1, 1))
    value = loss(net, loss.draw(x0, labels, torch.Generator().manual_seed(11)))

    t = steps_of(net, diffusion)
    assert len(set(t.tolist())) > 1, "t is drawn image by image"
    log_alphas = [math.log(1 - ((0.02 - 1e-4) * s / 400 + 1e-4)) for s in range(401)]
    squares = []
    for i in range(6):
        alpha_bar = math.exp(math.fsum(log_alphas[: int(t[i]) + 1]))
        eps = (net.x_t[i].double() - math.sqrt(alpha_bar) * x0[i].double()) / math.sqrt(1 - alpha_bar)
        assert eps.mean().abs() < 0.4
        assert 0.8 < eps.std() < 1.2, "what was added is standard normal noise"
        eps_hat = 0.3 * net.x_t[i].double() + float(t[i]) / 400
        squares.append(((eps - eps_hat) ** 2).mean().item())
    assert value.item() == pytest.approx(sum(squares) / 6, rel=1e-4)
    torch.testing.assert_close(net.labels, labels)


def test_the_loss_is_a_pure_function_of_the_generators_seed() -> None:
    loss, _ = loss_of(label_dropout=0.5)
    x0, _ = pair(dtype=torch.float32)
    net = RecordingNet(lambda x_t, labels, time: x_t * labels.sum(1).view(-1, 1, 1, 1))
    values = [loss(net, loss.draw(x0, torch.ones(4, 24), torch.Generator().manual_seed(seed))).item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_x0_weighted_by_snr_plus_one_is_the_loss_of_v() -> None:
    """Equal predictions have the same loss as v if the weights are below the limit."""
    rng = torch.Generator().manual_seed(5)
    guess = torch.rand((6, 3, 8, 8), generator=rng)
    x0, _ = pair((6, 3, 8, 8), torch.float32)
    losses = []
    for objective, weight in (("x0", "snr+1"), ("v", "flat")):
        loss, diffusion = loss_of(objective=objective, loss_weight=weight, weight_limit=1e6)

        def output(x_t: Tensor, labels: Tensor, time: Tensor, diffusion: Diffusion = diffusion) -> Tensor:
            t = (time.double() * 400).round().long().numpy()
            signal, noise = (torch.tensor(s[t], dtype=torch.float32).view(-1, 1, 1, 1) for s in (diffusion.schedule.signal, diffusion.schedule.noise))
            return diffusion.objective.target(guess, (x_t - signal * guess) / noise, signal, noise)

        losses.append(loss(RecordingNet(output), loss.draw(x0, torch.ones(6, 24), torch.Generator().manual_seed(0))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", LOSS_WEIGHTS.names())
def test_loss_weights_are_between_one_and_the_limit(name: str) -> None:
    config = Config().replace(weight_limit=7.0).training
    noise = torch.linspace(0.01, 1, 100)
    weight = LOSS_WEIGHTS.get(name)(noise, config)
    assert weight.shape == noise.shape
    assert 1 <= weight.min() <= weight.max() <= 7
    torch.testing.assert_close(LOSS_WEIGHTS.get("snr+1")(noise, config)[50:], noise[50:] ** -2)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_error_within_blocks_counts_more(size: int) -> None:
    """An error that is the same in all pixels of a block (a sixteenth of the side) counts once; the rest 1 + the detail weight times."""
    settings = {"loss_weight": "snr+1", "objective": "x0"}
    loss, _ = loss_of(detail_weight=3.0, **settings)
    plain, _ = loss_of(**settings)
    x0, error = pair((5, 3, size, size), torch.float32)
    batch = loss.draw(x0, torch.ones(5, 24), torch.Generator().manual_seed(0))
    side = size // 16
    means = error.double().view(5, 3, 16, side, 16, side).mean((3, 5))
    same = means.repeat_interleave(side, 2).repeat_interleave(side, 3)

    def of(measure: TrainingLoss, error: Tensor) -> float:
        return measure(lambda x_t, labels, time: x0 + error.float(), batch).item()

    assert of(loss, same) == pytest.approx(of(plain, same), rel=1e-4)
    assert of(loss, error - same) == pytest.approx(4 * of(plain, error - same), rel=1e-4)
    expected = (batch.weight.double() * (error.double().square() + 3 * (error - same).square())).mean().item()
    assert of(loss, error) == pytest.approx(expected, rel=1e-4)


# Times


def times(count: int, **settings: object) -> Tensor:
    config = Config().replace(**settings)
    return TIME_SAMPLINGS.get(config.training.time_sampling)(count, config.diffusion.timesteps, config.training, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("timesteps", [2, 400])
@pytest.mark.parametrize("mean", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("name", TIME_SAMPLINGS.names())
def test_times_are_between_1_and_T(name: str, mean: float, timesteps: int) -> None:
    t = times(5_000, time_sampling=name, time_mean=mean, time_std=5.0, timesteps=timesteps)
    assert t.shape == (5_000,)
    assert t.dtype == torch.int64
    assert (t.min().item(), t.max().item()) == (1, timesteps)


def test_uniform_times_are_uniform_on_1_to_T() -> None:
    counts = torch.bincount(times(100_000, timesteps=10), minlength=11)
    assert counts[0] == 0
    # Each count is binomial with mean 10,000 and standard deviation 95.
    assert (counts[1:] - 10_000).abs().max() < 5 * 95


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 1.0), (-1.5, 0.4)])
def test_logit_normal_times(mean: float, std: float) -> None:
    t = times(50_000, time_sampling="logit-normal", time_mean=mean, time_std=std, timesteps=10_000)
    logits = torch.logit((t.double() - 0.5) / 10_000)
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, abs=0.02)


def test_the_mean_of_times_moves_evenly_to_its_end() -> None:
    loss, diffusion = loss_of(time_sampling="logit-normal", time_mean=0.5, time_mean_end=-1.5, time_std=0.5, timesteps=10_000)
    net, x0, labels = RecordingNet(lambda x_t, labels, time: x_t), torch.zeros(20_000, 1, 1, 1), torch.ones(20_000, 24)
    for fraction, mean in ((0.0, 0.5), (0.25, 0.0), (1.0, -1.5)):
        loss(net, loss.draw(x0, labels, torch.Generator().manual_seed(0), fraction=fraction))
        t = steps_of(net, diffusion)
        assert torch.logit((t.double() - 0.5) / 10_000).mean().item() == pytest.approx(mean, abs=0.02)


def test_without_an_end_the_times_do_not_depend_on_the_progress_of_training() -> None:
    loss, _ = loss_of(time_sampling="logit-normal", time_mean=0.5)
    x0 = pair(dtype=torch.float32)[0]
    early, late = (loss.draw(x0, torch.ones(4, 24), torch.Generator().manual_seed(0), fraction=fraction) for fraction in (0.0, 0.9))
    assert torch.equal(early.time, late.time)


# Recognised objects


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_cross_entropy_of_recognised_objects_is_added(weight: float) -> None:
    loss, _ = loss_of(label_loss=weight, label_dropout=1.0)
    x0 = pair(dtype=torch.float32)[0]
    labels = (torch.rand((4, 24), generator=torch.Generator().manual_seed(1)) < 0.2).float()
    batch = loss.draw(x0, labels, torch.Generator().manual_seed(0))
    logits = torch.randn((4, 24), generator=torch.Generator().manual_seed(2))
    plain = loss(lambda x_t, labels, time: x_t, batch)
    probability = torch.sigmoid(logits.double())
    # The objects in the image count, whether or not their labels were dropped from the network's input.
    expected = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    assert batch.labels.sum() == 0
    found = loss(lambda x_t, labels, time: (x_t, logits), batch)
    assert (found - plain).item() == pytest.approx(weight * expected.item(), rel=1e-4)


@pytest.mark.parametrize("size", [64, 96])
def test_the_error_of_the_estimate_before_the_correction_is_added_for_large_images(size: int) -> None:
    """With the weight of its noise level, and not where only x_t shows the grain."""
    loss, diffusion = loss_of(loss_weight="snr+1", objective="x0", timesteps=1000)
    rng = torch.Generator().manual_seed(0)
    x0 = torch.rand((64, 3, size, size), generator=rng)
    batch = loss.draw(x0, torch.ones(64, 24), rng)
    estimate, logits = torch.randn(x0.shape, generator=rng), torch.zeros(64, 24)
    t = (batch.time * 1000).round().long()
    noise = torch.tensor(np.asarray(diffusion.schedule.noise))[t]
    errors = (estimate - x0).double().square().mean((1, 2, 3)) * (noise**-2).clamp(max=20)
    assert 0 < (t < 30).sum() < 64
    plain, found = (loss(lambda x_t, labels, time, given=given: (x_t, logits, *given), batch) for given in ((), (estimate,)))
    assert (found - plain).item() == pytest.approx((errors * (t >= 30)).sum().item() / 64 * (size > 64), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("count", [7, 8])
def test_the_likelihood_of_the_errors_of_every_fourth_image_is_added(count: int) -> None:
    """Also where the batch is split; it changes what errors are expected and, at low noise only, the estimate."""
    loss, plain = loss_of(error_loss=0.5, objective="x0")[0], loss_of(objective="x0")[0]
    rng = torch.Generator().manual_seed(0)
    x0 = torch.rand((count, 3, 16, 16), generator=rng)
    batch = loss.draw(x0, torch.ones(count, 24), rng)._replace(time=torch.linspace(0.1, 0.4, count))  # of the images 0 and 4, 0.1 and 0.3 or 0.27
    given = [torch.randn((count, channels, 16, 16), generator=rng).requires_grad_() for channels in (3, 3 * BANDS, 3 * BANDS)]

    def net(chosen: slice) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x_t, labels, time: (x_t, torch.zeros(len(x_t), 24), *(values[chosen] for values in given))

    every = slice(None)
    added = loss(net(every), batch) - plain(net(every), batch)
    expected = 0.5 * negative_log_likelihood(*given, x0)[::4].sum() * 4 / count
    assert added.item() == pytest.approx(expected.item(), rel=1e-3)
    in_parts, start = 0.0, 0
    for part in batch.parts(3):
        chosen = slice(start, start := start + len(part.x_t))
        in_parts += (loss(net(chosen), part) - plain(net(chosen), part)).item() * len(part.x_t) / count
    assert in_parts == pytest.approx(added.item(), rel=1e-3)
    added.backward()
    trained = given[0].grad.abs().amax((1, 2, 3))
    assert (trained[::4] > 0).tolist() == [True, False], "t / T below and above LIKELY_BELOW"
    assert trained[torch.arange(count) % 4 > 0].max() == 0


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_squared_error_of_the_number_of_objects_is_added_where_they_can_be_counted(weight: float) -> None:
    """Objects in the image count, whether or not their labels were dropped from the network's input."""
    loss, _ = loss_of(label_loss=weight, label_dropout=1.0, objective="x0")
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand((6, 24), generator=rng) < 0.1).float()
    batch = loss.draw(torch.rand((6, 3, 16, 16), generator=rng), labels, rng)._replace(time=torch.tensor([0.01, 0.1, 0.19, 0.21, 0.5, 1.0]))
    counted, zero = 3 * torch.rand(6, generator=rng), torch.zeros(6, 3, 16, 16)
    of_others = (torch.zeros(6, 24), zero, zero, zero, zero)
    right, found = (loss(lambda x_t, labels, time, number=number: (x_t, *of_others, number), batch).item() for number in (labels.sum(1), counted))
    assert found - right == pytest.approx(weight * (counted - labels.sum(1))[:3].square().sum().item() / 6, rel=1e-4, abs=1e-6)


# Dropped labels


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_label_dropout_drops_the_given_fraction(share: float) -> None:
    loss, _ = loss_of(label_dropout=share)
    labels = torch.zeros(4_000, 24)
    labels[:, :3] = 1
    net = RecordingNet(lambda x_t, labels, time: x_t)
    loss(net, loss.draw(torch.zeros(4_000, 1, 1, 1), labels, torch.Generator().manual_seed(0)))
    kept = net.labels.sum(1)
    assert set(kept.tolist()) <= {0.0, 3.0}, "an image keeps all of its labels or none"
    torch.testing.assert_close(net.labels[kept > 0], labels[kept > 0])
    assert (kept == 0).float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4_000))


def test_label_dropout_does_not_change_noise_and_times() -> None:
    """The same seed gives the same x_t and t with and without dropout, so recipes can be compared."""
    seen = []
    for share in (0.0, 0.5):
        net = RecordingNet(lambda x_t, labels, time: x_t)
        loss, _ = loss_of(label_dropout=share)
        loss(net, loss.draw(pair(dtype=torch.float32)[0], torch.ones(4, 24), torch.Generator().manual_seed(0)))
        seen.append((net.x_t, net.time))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_report_has_no_label_dropout() -> None:
    assert TrainingConfig().label_dropout == 0


# Mirrored images


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_given_fraction_of_images_is_mirrored(share: float) -> None:
    """A prediction of the original x0 is exact except for mirrored images."""
    count = 2_000
    loss, _ = loss_of(objective="x0", mirror=share)
    x0 = torch.zeros(count, 1, 2, 2)
    x0[:, :, 0, 0] = 1  # after mirroring it is at (0, 1): two of four pixels differ by one
    value = loss(RecordingNet(lambda x_t, labels, time: x0), loss.draw(x0, torch.ones(count, 24), torch.Generator().manual_seed(0))).item()
    assert 2 * value == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


def test_mirroring_does_not_change_noise_times_and_label_dropout() -> None:
    seen = []
    for share in (0.0, 1.0):
        net = RecordingNet(lambda x_t, labels, time: x_t)
        loss, _ = loss_of(mirror=share, label_dropout=0.5)
        loss(net, loss.draw(torch.zeros(64, 3, 8, 8), torch.ones(64, 24), torch.Generator().manual_seed(0)))
        seen.append((net.x_t, net.time, net.labels))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
