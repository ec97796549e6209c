"""Every hyperparameter, once: its name, default, range and help text.

The defaults are the report's recipe. A value travels one way: command line -> one frozen
``Config`` -> checkpoint metadata -> back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddpmctl.errors import UsageError, show
from ddpmctl.registry import ACTIVATIONS, LOSS_WEIGHTS, NETWORKS, OBJECTIVES, OPTIMIZERS, SAMPLERS, SCHEDULES, SPACINGS, TIME_SAMPLINGS, Registry

Value = str | int | float | bool | None


def setting(
    default: Value,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Registry[Any] | tuple[str, ...] | None = None,
    unset: str = "none",
) -> Any:
    """Declare a hyperparameter: default, help text, inclusive range (``above``: exclusive) or choices; ``unset`` is what None is called."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "above": above, "choices": choices, "unset": unset})


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    net: str = setting("context-unet", "Network.", choices=NETWORKS)
    act: str = setting("gelu", "Activation of the residual blocks.", choices=ACTIVATIONS)
    width: int = setting(128, "Channels of the first level.", low=8, high=1024)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts."""

    schedule: str = setting("linear", "Noise schedule.", choices=SCHEDULES)
    timesteps: int = setting(400, "Diffusion steps T.", low=2, high=100_000)
    beta_1: float = setting(1e-4, "Smallest beta (linear, cosine-periodic).", above=0, high=0.999)
    beta_2: float = setting(0.02, "Largest beta (linear, cosine-periodic).", above=0, high=0.999)
    period: float = setting(50.0, "Period of cosine-periodic, in steps.", above=0)
    objective: str = setting("eps", "What the network predicts.", choices=OBJECTIVES)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation and its budget."""

    epochs: int | None = setting(600, "Passes over the training images.", low=1)
    minutes: float | None = setting(None, "Budget in minutes of training, instead of --epochs; the decay then follows the clock.", above=0)
    batch_size: int = setting(64, "Images per step.", low=1, high=65_536)
    optimizer: str = setting("adam", "Optimizer.", choices=OPTIMIZERS)
    lr: float = setting(1e-4, "Learning rate.", above=0, high=10)
    lr_decay: str = setting("none", "Decay of the learning rate: linear is lr * (1 - epoch / epochs).", choices=("none", "linear"))
    warmup: int = setting(0, "Steps over which the learning rate rises from zero.", low=0)
    time_sampling: str = setting("uniform", "Distribution from which t is drawn.", choices=TIME_SAMPLINGS)
    time_mean: float = setting(0.0, "Mean of logit(t / T) (logit-normal).", low=-10, high=10)
    time_mean_end: float | None = setting(None, "Mean of logit(t / T) at the end of training, reached evenly (none: --time-mean throughout).", low=-10, high=10)
    time_std: float = setting(1.0, "Standard deviation of logit(t / T) (logit-normal).", above=0, high=10)
    loss_weight: str = setting("flat", "Weight of the squared error by noise level.", choices=LOSS_WEIGHTS)
    weight_limit: float = setting(20.0, "Largest weight (snr+1).", low=1, high=1e6)
    detail_weight: float = setting(0.0, "Extra weight of the error within blocks of a sixteenth of the side (4x4 pixels of 64x64).", low=0, high=100)
    label_loss: float = setting(0.0, "Weight of the loss by which the network learns to name and count the objects in x_t (fine-unet).", low=0, high=100)
    error_loss: float = setting(0.0, "Weight of the likelihood by which the network learns how far off its estimate is (fine-unet).", low=0, high=100)
    label_dropout: float = setting(0.0, "Share of training images shown without labels; guidance needs some.", low=0, high=1)
    mirror: float = setting(0.0, "Share of training images shown mirrored, left to right; labels stay true.", low=0, high=1)
    ema: float | None = setting(None, "Decay of the exponential moving average of the weights (none: off).", low=0, high=0.999999)
    save_every: int = setting(5, "Epochs between checkpoints; each is scored on test and new_test.", low=1)
    seed: int = setting(0, "Seed of everything random.", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling from the network."""

    sampler: str = setting("ddpm", "Sampler.", choices=SAMPLERS)
    steps: int | None = setting(None, "Sampler steps; auto: all T for ddpm, 50 for ddim, 16 for dpm++2m.", low=1, unset="auto")
    spacing: str = setting("even", "How the steps are spaced where they are fewer than T.", choices=SPACINGS)
    guidance: float = setting(0.0, "Classifier-free guidance w; 0 is the plain conditional model, more doubles the network calls.", low=0, high=100)
    guidance_from: float = setting(0.0, "Guide only where t / T is at least this.", low=0, high=1)
    guidance_to: float = setting(1.0, "Guide only where t / T is at most this.", low=0, high=1)
    eta: float = setting(0.0, "Share of ancestral noise (ddim).", low=0, high=1)
    particles: int = setting(1, "Noises tried per image, at most; one in which the network recognises the labels is kept (fine-unet).", low=1, high=64)
    accept: float = setting(1.0, "Probability of the right objects with which a particle is kept at once (1: try all, keep the likeliest).", above=0, high=1)
    retry_from: float = setting(1.0, "t / T to which a rejected particle is noised again (1: new noise for each).", above=0, high=1)


COMPILE_MODES = ("none", "cuda-graph", "default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how it runs; no part of the recipe."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    precision: str = setting("auto", "Arithmetic of the network; auto takes bf16 where it is measurably faster.", choices=("auto", "fp32", "bf16"))
    threads: int | None = setting(None, "CPU threads (none: torch decides).", low=1, high=1024)
    compile: str = setting("none", "How the network runs in training: cuda-graph (one GPU), or a mode of torch.compile.", choices=COMPILE_MODES)


@dataclass(frozen=True)
class RunConfig:
    """How a run is kept and what it survives; no part of the recipe."""

    checkpoint_minutes: float | None = setting(10.0, "Minutes between states to resume from, beside those after each score (none: off).", above=0)
    keep: int | None = setting(None, "Scored checkpoints kept beside the best and the last (none: all).", low=0)
    on_nan: str = setting("stop", "On NaN or inf: stop, or reload the last saved state at half the learning rate.", choices=("stop", "rollback"))
    micro_batch: int | None = setting(None, "Images per network call; their gradients are added up to the batch's (none: the whole batch).", low=1)
    peer_timeout: float = setting(120.0, "Under torchrun, seconds without an answer from a process that others wait for, until the job ends.", low=5)
    sync_bn: str = setting("on", "Under torchrun, batch norm sees the whole batch, or each process's share of it (off).", choices=("on", "off"))


@dataclass(frozen=True)
class Config:
    """One run's settings, all of them."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    device: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, dict[str, Value]]:
        """Return the settings as nested plain values, {section: {name: value}}."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Value]:
        """Return the settings as {name: value}; names are unique over all sections."""
        return {name: value for section in self.to_dict().values() for name, value in section.items()}

    @staticmethod
    def from_flat(values: Mapping[str, Any]) -> Config:
        """Build a checked config from {name: value}; what is absent takes its default.

        Raises:
            UsageError: an unknown name, a wrong type, a value out of range.
        """
        known = {s.name: s for s in settings()}
        for name in values:
            if name not in known:
                raise UsageError(f"unknown setting {show(name)}; there are {', '.join(known)}")
        checked = {name: known[name].check(value) for name, value in values.items()}
        config = Config(**{section: kind(**{s.name: checked[s.name] for s in settings(section) if s.name in checked}) for section, kind in SECTIONS.items()})
        _check_together(config)
        return config

    @staticmethod
    def from_dict(values: Any) -> Config:
        """Build a checked config from ``to_dict``'s content; sections may have other names, as those of earlier versions.

        Raises:
            UsageError: as ``from_flat``.
            ValueError: the values are not nested like that.
        """
        if not isinstance(values, Mapping) or not all(isinstance(section, Mapping) for section in values.values()):
            raise ValueError("settings are not nested by section")
        return Config.from_flat({name: value for section in values.values() for name, value in section.items()})

    def replace(self, **values: Value) -> Config:
        """Return a checked copy with some settings changed, by flat name."""
        return Config.from_flat({**self.flat(), **values})


SECTIONS: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(Config)}
RECIPE = ("model", "diffusion", "training", "sampling")  # what a result depends on


@dataclass(frozen=True)
class Setting:
    """One hyperparameter as declared above."""

    section: str
    name: str
    kind: type[Any]
    optional: bool
    default: Value
    help: str
    low: float | None
    high: float | None
    above: float | None
    choices: Registry[Any] | tuple[str, ...] | None
    unset: str

    @property
    def flag(self) -> str:
        """The command-line flag, ``--batch-size``."""
        return "--" + self.name.replace("_", "-")

    def range_text(self) -> str:
        """Return the permitted range or choices in words, empty where anything goes."""
        if self.choices is not None:
            return ", ".join(self.choices.names() if isinstance(self.choices, Registry) else self.choices)
        return range_words(self.low, self.high, self.above)

    def check(self, value: Any, source: str = "") -> Value:
        """Return the value in its type; strings are read as on a command line.

        Args:
            value: as given.
            source: where it was given, for the message; empty for the flag.

        Raises:
            UsageError: the value has the wrong type or lies out of range.
        """
        try:
            return self._checked(value)
        except UsageError as error:
            raise UsageError(f"{source or self.flag}: {error}") from None

    def _checked(self, value: Any) -> Value:
        if value is None or (isinstance(value, str) and value.lower() in ("none", self.unset) and self.optional):
            if not self.optional:
                raise UsageError("a value is needed")
            return None
        converted = self._convert(value)
        if isinstance(self.choices, Registry):
            return self.choices.check(str(converted))
        if self.choices is not None:
            if str(converted).lower() not in self.choices:
                raise UsageError(f"{show(value)} is none of {', '.join(self.choices)}")
            return str(converted).lower()
        if isinstance(converted, int | float) and not isinstance(converted, bool):
            check_range(converted, self.low, self.high, self.above)
        return converted

    def _convert(self, value: Any) -> str | int | float:
        wrong = UsageError(f"{show(value)} is not {'a whole number' if self.kind is int else 'a number' if self.kind is float else 'text'}")
        if isinstance(value, bool):
            raise wrong
        if self.kind is str:
            if not isinstance(value, str):
                raise wrong
            return value
        try:
            number = self.kind(value)
            finite = math.isfinite(number)
        except (TypeError, ValueError, OverflowError):  # the last one also for a whole number beyond every float
            raise wrong from None
        if not finite or (self.kind is int and isinstance(value, float) and value != number):
            raise wrong
        return typing.cast("int | float", number)


def range_words(low: float | None, high: float | None, above: float | None = None) -> str:
    """Return a range in words, empty if there is none; ``low`` and ``high`` are in it, ``above`` is not."""
    lower = f"above {above:g}" if above is not None else f"at least {low:g}" if low is not None else ""
    upper = f"at most {high:g}" if high is not None else ""
    return ", ".join(filter(None, (lower, upper)))


def check_range(number: float, low: float | None, high: float | None, above: float | None = None, *, name: str = "") -> None:
    """Refuse a number outside a range.

    Raises:
        UsageError: says the range, after the flag or setting ``name`` if it is given.
    """
    if (low is not None and number < low) or (high is not None and number > high) or (above is not None and number <= above):
        raise UsageError(f"{f'{name}: ' if name else ''}{number:g} is out of range ({range_words(low, high, above)})")


def settings(section: str | None = None) -> Iterator[Setting]:
    """Yield every hyperparameter, in order, of one section or of all."""
    for name, owner in SECTIONS.items():
        if section not in (None, name):
            continue
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            kinds = typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else (hints[field.name],)
            yield Setting(
                section=name,
                name=field.name,
                kind=next(kind for kind in kinds if kind is not type(None)),
                optional=type(None) in kinds,
                default=typing.cast("Value", field.default),
                **{key: field.metadata[key] for key in ("help", "low", "high", "above", "choices", "unset")},
            )


def _check_together(config: Config) -> None:
    training, diffusion, sampling = config.training, config.diffusion, config.sampling
    if (training.epochs is None) == (training.minutes is None):
        raise UsageError("--epochs and --minutes: give one budget, not " + ("both" if training.epochs else "none"))
    if diffusion.beta_2 < diffusion.beta_1:
        raise UsageError(f"--beta-2: {diffusion.beta_2:g} is below --beta-1 {diffusion.beta_1:g}")
    if sampling.steps is not None and sampling.steps > diffusion.timesteps:
        raise UsageError(f"--steps: {sampling.steps} is more than the model's {diffusion.timesteps} timesteps")
    if sampling.guidance_to < sampling.guidance_from:
        raise UsageError(f"--guidance-to: {sampling.guidance_to:g} is below --guidance-from {sampling.guidance_from:g}")
    if config.model.width % 8:
        raise UsageError(f"--width: {config.model.width} is not a multiple of 8, which group norm needs")
