"""The denoiser made of a network, a schedule and an objective, and its training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import DiffusionConfig, TrainingConfig
from ddpmctl.diffusion.objectives import Objective, Prediction
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.nets.expert import LOW_NOISE, OCTAVES
from ddpmctl.nets.wiener import negative_log_likelihood
from ddpmctl.registry import LOSS_WEIGHTS, OBJECTIVES, TIME_SAMPLINGS


class Guidance(NamedTuple):
    """Classifier-free guidance, eps = (1 + w) eps_c - w eps_u (Ho & Salimans 2022, eq. 6), in an interval (Kynkaanniemi et al. 2024).

    Attributes:
        w: the guidance weight.
        low, high: guidance is applied for low <= t / T <= high.
    """

    w: float = 0.0
    low: float = 0.0
    high: float = 1.0

    def at(self, time: float) -> float:
        """Return the weight at t / T; where it is 0, a step calls the network once instead of twice."""
        return self.w if self.low <= time <= self.high else 0.0


@dataclass(frozen=True)
class Diffusion:
    """A forward process and the quantity that the network predicts."""

    schedule: Schedule
    objective: Objective

    @staticmethod
    def of(config: DiffusionConfig) -> Diffusion:
        """Return the diffusion of a config."""
        return Diffusion(make_schedule(config), OBJECTIVES.get(config.objective))

    def denoiser(self, net: nn.Module, labels: Tensor, guidance: Guidance | None = None) -> Callable[[Tensor, int], Prediction]:
        """Return the function (x_t, t) -> (x0_hat, eps_hat) that samplers call.

        Args:
            net: (x_t, labels, t / T) -> the objective's quantity.
            labels: (B, 24), multi-hot.
            guidance: None for no guidance.
        """
        guidance = guidance or Guidance()

        def denoise(x_t: Tensor, t: int) -> Prediction:
            time = torch.full((len(x_t),), t / self.schedule.timesteps, device=x_t.device)
            w = guidance.at(t / self.schedule.timesteps)
            if w == 0:
                out = net(x_t, labels, time).float()
            else:
                both = net(x_t.repeat(2, 1, 1, 1), torch.cat((labels, torch.zeros_like(labels))), time.repeat(2))
                conditional, unconditional = both.float().chunk(2)
                # eps is linear in the output of every objective, so this equals eq. 6.
                out = (1 + w) * conditional - w * unconditional
            return self.objective.prediction(out, x_t, float(self.schedule.signal[t]), float(self.schedule.noise[t]))

        return denoise


EVERY = slice(None)


class TrainingBatch(NamedTuple):
    """A training batch with all random values drawn.

    Attributes:
        x_t, target: (B, 3, H, W).
        labels: (B, 24), all zero where dropped.
        shown: (B, 24), of the objects in the image.
        time: t / T, (B,).
        weight: of the squared error, (B, 1, 1, 1).
        checked: whether the likelihood of the errors is part of the loss, (B,), on the CPU; of every fourth image.
        expert_weight: of the squared error of a network's expert for low noise, (B, 1, 1, 1): 1 / sigma there, else 0.
    """

    x_t: Tensor
    target: Tensor
    labels: Tensor
    shown: Tensor
    time: Tensor
    weight: Tensor
    checked: Tensor
    expert_weight: Tensor

    def parts(self, count: int) -> Iterator[TrainingBatch]:
        """Split the batch into ``count`` parts of almost equal size, the largest first."""
        size = len(self.x_t)
        for part in range(count):
            chosen = slice(-(-size * part // count), -(-size * (part + 1) // count))
            yield TrainingBatch(*(value[chosen] for value in self))


# Images with more pixels on a side than this have a loss of the estimate before x_t corrects it. Without it, the layers leave edges to the correction,
# which lets noise of x_t pass there. At 64x64 that loss does not help. Measured in docs/experiments.md.
LARGE = 64
ESTIMATED_FROM = 0.03  # t / T; below, only x_t shows the grain of the image, and an estimate need not
LIKELY_BELOW = 0.25  # t / T; here, the likelihood of errors also trains the estimate; without it, colours are wrong by 0.05 grey levels
CHECKED = 4  # one of so many images is enough for the likelihood of errors; for all, a step would take 15 % longer
COUNTED_BELOW = 0.2  # t / T; here, x_t shows all objects, and they can be counted
BLOCKS = 16  # of --detail-weight, on each side of an image: for 64x64, a block has 4x4 pixels


class TrainingLoss:
    """MSE between the network's output and the objective's target at random t (Ho et al. 2020, eq. 14)."""

    def __init__(self, diffusion: Diffusion, config: TrainingConfig, device: torch.device) -> None:
        """Copy the schedule to the device, float32 (T + 1,)."""
        self.objective, self.timesteps, self.config = diffusion.objective, diffusion.schedule.timesteps, config
        self.signal = torch.tensor(diffusion.schedule.signal, dtype=torch.float32, device=device)
        self.noise = torch.tensor(diffusion.schedule.noise, dtype=torch.float32, device=device)
        self.weigh: Callable[[Tensor, TrainingConfig], Tensor] = LOSS_WEIGHTS.get(config.loss_weight)
        self.draw_times: Callable[[int, int, TrainingConfig, torch.Generator], Tensor] = TIME_SAMPLINGS.get(config.time_sampling)

    def draw(self, x0: Tensor, labels: Tensor, rng: torch.Generator, *, count: int | None = None, share: slice = EVERY, fraction: float = 0.0) -> TrainingBatch:
        """Return a batch at random t, with random noise and some labels dropped.

        Args:
            x0: (B, 3, H, W) in [-1, 1].
            labels: (B, 24), multi-hot.
            rng: a generator on x0's device.
            count: size of the global batch, if x0 is one rank's share of it; random values do not depend on the number of ranks.
            share: the indices of x0 in the global batch.
            fraction: used part of the training budget, 0 to 1.
        """
        count = len(x0) if count is None else count
        t = self.draw_times(count, self.timesteps, times_at(self.config, fraction), rng)[share]  # (B,) in 1..T
        eps = torch.randn((count, *x0.shape[1:]), generator=rng, device=x0.device)[share]
        keep = torch.rand((count, 1), generator=rng, device=x0.device)[share] >= self.config.label_dropout
        if self.config.mirror > 0:
            mirrored = torch.rand((count, 1, 1, 1), generator=rng, device=x0.device)[share] < self.config.mirror
            x0 = torch.where(mirrored, x0.flip(3), x0)
        signal, noise = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        target = self.objective.target(x0, eps, signal, noise)
        checked = torch.arange(count)[share] % CHECKED == 0  # on the CPU: a mask on a GPU would synchronise with it
        time = t / self.timesteps
        expert_weight = signal / noise * (time < LOW_NOISE).view(-1, 1, 1, 1)
        return TrainingBatch(signal * x0 + noise * eps, target, labels * keep, labels, time, self.weigh(noise, self.config), checked, expert_weight)

    def __call__(self, net: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]], batch: TrainingBatch) -> Tensor:
        """Return the mean weighted loss of a batch; for an empty batch, 0 with zero gradients.

        ``net`` returns its output or, if it recognises objects, its output and logits of the labels (B, 24), whose cross-entropy is added. If it also
        estimates errors, it returns an estimate of the target before x_t corrects it, and log s and v of the estimate's errors. Their negative
        log-likelihood is added, which trains the estimate only where t / T is below ``LIKELY_BELOW``; and for images larger than ``LARGE`` and t / T from
        ``ESTIMATED_FROM``, the weighted error of the estimate. Last come the output of an expert for low noise, whose error is added too, and how many
        objects each image shows, (B,), whose squared error is added with the weight of the cross-entropy where t / T is below ``COUNTED_BELOW``.
        """
        found = net(batch.x_t, batch.labels, batch.time)
        out, *also = found if isinstance(found, tuple) else (found,)
        loss = self._squared_error(out.float(), batch.target, batch.weight)
        if also:
            loss = loss + self.config.label_loss * _mean(F.binary_cross_entropy_with_logits(also[0], batch.shown, reduction="none"))
        if self.config.error_loss:
            chosen = batch.checked.nonzero()[:, 0].to(out.device, non_blocking=True)
            estimate, log_error, direction, target, time = (values.index_select(0, chosen) for values in (*also[1:4], batch.target, batch.time))
            estimate = torch.where((time < LIKELY_BELOW).view(-1, 1, 1, 1), estimate, estimate.detach())
            loss = loss + self.config.error_loss * CHECKED * negative_log_likelihood(estimate, log_error, direction, target).sum() / max(1, len(out))
        if len(also) > 1 and out.shape[-1] > LARGE:
            weight = batch.weight * (batch.time >= ESTIMATED_FROM).view(-1, 1, 1, 1)
            loss = loss + self._squared_error(also[1], batch.target, weight)
        if len(also) > 4:
            loss = loss + _mean(batch.expert_weight * F.mse_loss(also[4], batch.target, reduction="none"))
            wrong = (also[5] - batch.shown.sum(1)).square() * (batch.time < COUNTED_BELOW)
            loss = loss + self.config.label_loss * _mean(wrong)
        return loss

    def _squared_error(self, out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean squared error, in which errors within blocks of pixels count 1 + ``detail_weight`` times.

        The error of a pixel is the mean of its block's errors, which counts once, and a rest. The means hold most of what is unknown at high noise,
        the place and colour of objects; the rest holds their edges and faces.
        """
        loss, extra = _mean(weight * F.mse_loss(out, target, reduction="none")), self.config.detail_weight
        if not extra:
            return loss
        means, wanted = (F.avg_pool2d(values, max(1, values.shape[-1] // BLOCKS)) for values in (out, target))
        return (1 + extra) * loss - extra * _mean(weight * F.mse_loss(means, wanted, reduction="none"))


def _mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor (B, ...). Where B is 0, as in a process without a share of the batch, it is 0, with zero gradients."""
    return values.mean() if len(values) else values.sum()


def times_at(config: TrainingConfig, fraction: float) -> TrainingConfig:
    """Return the settings with the mean of logit(t / T) at a ``fraction`` of training: even from ``time_mean`` to ``time_mean_end``.

    High noise levels decide where objects are, and low ones their edges and faces. What is trained last, at a small learning rate, is learned
    most exactly.
    """
    if config.time_mean_end is None:
        return config
    return replace(config, time_mean=config.time_mean + fraction * (config.time_mean_end - config.time_mean))


@LOSS_WEIGHTS.register("flat")
def flat(noise: Tensor, config: TrainingConfig) -> Tensor:
    """1 at every noise level; Ho et al. 2020, eq. 14."""
    return torch.ones_like(noise)


@LOSS_WEIGHTS.register("snr+1")
def snr_plus_one(noise: Tensor, config: TrainingConfig) -> Tensor:
    """SNR + 1 = 1 / noise^2, at most --weight-limit; for an x0 loss, equal to the v loss; Salimans & Ho 2022, section 4."""
    return noise.square().reciprocal().clamp(max=config.weight_limit)


@TIME_SAMPLINGS.register("uniform")
def uniform(count: int, timesteps: int, config: TrainingConfig, rng: torch.Generator) -> Tensor:
    """t uniform on 1..T."""
    return torch.randint(1, timesteps + 1, (count,), generator=rng, device=rng.device)


@TIME_SAMPLINGS.register("logit-normal")
def logit_normal(count: int, timesteps: int, config: TrainingConfig, rng: torch.Generator) -> Tensor:
    """logit(t / T) normal with --time-mean and --time-std; Esser et al. 2024, eq. 19."""
    z = torch.randn((count,), generator=rng, device=rng.device) * config.time_std + config.time_mean
    return (torch.sigmoid(z) * timesteps).ceil().long().clamp_(1, timesteps)


@TIME_SAMPLINGS.register("logit-normal-low")
def logit_normal_low(count: int, timesteps: int, config: TrainingConfig, rng: torch.Generator) -> Tensor:
    """as logit-normal, but each t / T below 0.05 is drawn again, uniform in log t from 0.05 / 128 to 0.05."""
    t = logit_normal(count, timesteps, config, rng)
    below = LOW_NOISE * timesteps * 2.0 ** (-OCTAVES * torch.rand((count,), generator=rng, device=rng.device))
    return torch.where(t < LOW_NOISE * timesteps, below.long().clamp_(min=1), t)
