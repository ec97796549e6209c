"""Noise is a pure function of (seed, purpose, index), and images do not depend on their batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.randomness import ImageNoise, derived_seed, generator
from ddpmctl.diffusion.samplers import Frame
from ddpmctl.iclevr import CLASSES
from ddpmctl.registry import NETWORKS, SAMPLERS
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images, to_uint8
from ddpmctl.sampling.requests import ImageRequest, requests_for
from ddpmctl.training.trainer import make_network

CPU = torch.device("cpu")
SHAPE = (3, 4, 4)
KEYS = [(0, "test", index, copy) for index in range(5) for copy in range(2)]
CONDITIONS = [(CLASSES[i], CLASSES[-1 - i]) for i in range(5)]

indices = st.lists(st.integers(0, 10**6) | st.sampled_from(["test", "new_test", "sample"]), max_size=3).map(tuple)
uses = st.tuples(st.integers(0, 2**63 - 1), st.sampled_from(["image", "step", "order", "weights"]), indices)


def draws(keys: list[tuple[int | str, ...]], count: int = 3) -> Tensor:
    noise = ImageNoise(keys, SHAPE, CPU)
    return torch.stack([noise() for _ in range(count)], 1)  # (B, count, *SHAPE)


@given(batch=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6))
def test_the_noise_of_an_image_is_the_same_in_any_batch(batch: list[tuple[int | str, ...]]) -> None:
    alone = [draws([key])[0] for key in batch]
    assert torch.equal(draws(batch), torch.stack(alone))


def test_noise_differs_between_images_and_between_draws() -> None:
    flat = draws(KEYS).flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    assert flat.mean().abs() < 0.1
    assert 0.9 < flat.std() < 1.1


@given(one=uses, other=uses)
def test_different_uses_have_different_seeds(one: tuple, other: tuple) -> None:
    seeds = [derived_seed(seed, purpose, *index) for seed, purpose, index in (one, other)]
    assert (seeds[0] == seeds[1]) == (one == other)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("one", "other"), [((0, "image", "a/b"), (0, "image", "a", "b")), ((0, "image", "1"), (0, "image", 1)), ((0, "image", 1, "2/3"), (0, "image", 1, 2, 3))]
)
def test_uses_with_the_same_joined_text_have_different_seeds(one: tuple, other: tuple) -> None:
    assert derived_seed(*one) != derived_seed(*other)


def test_generators_are_new_and_do_not_change_the_global_state() -> None:
    state = torch.get_rng_state()
    first, second = (torch.randn(8, generator=generator(4, "step", 7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(8, generator=generator(4, "order", 7)))
    assert not torch.equal(first, torch.randn(8, generator=generator(4, "step", 8)))
    assert not torch.equal(first, torch.randn(8, generator=generator(5, "step", 7)))
    draws(KEYS)
    make_network(Config().replace(width=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    nets = [make_network(Config().replace(width=8, seed=seed)).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not torch.equal(nets[0]["out.3.weight"], nets[2]["out.3.weight"])


# Images


def pipeline_of(net: str = "context-unet", **settings: object) -> SamplingPipeline:
    config = Config().replace(net=net, width=8, timesteps=20, beta_2=0.4, steps=4, **settings)
    network = make_network(config).eval()
    with torch.no_grad():
        for weight in network.parameters():  # layers that start at zero would hide the labels
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return SamplingPipeline(network, Diffusion.of(config.diffusion), config.sampling, ComputeDevice(CPU, "fp32"))


def frames(made: SamplingPipeline, requests: list[ImageRequest], batch_size: int) -> list[Frame]:
    return [frame for start in range(0, len(requests), batch_size) for frame in made.frames(requests[start : start + batch_size])]


def images(made: SamplingPipeline, requests: list[ImageRequest], batch_size: int) -> Tensor:
    """Return the finished images, not yet clamped: (N, 3, 64, 64)."""
    return torch.cat([frame.x_t for frame in frames(made, requests, batch_size) if frame.t == 0])


@pytest.mark.parametrize("net", NETWORKS.names())
@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS.names()), ("ddim", 1.0)])
def test_images_do_not_depend_on_their_batch(sampler: str, eta: float, net: str) -> None:
    made = pipeline_of(net, sampler=sampler, eta=eta, guidance=1.0)
    requests = requests_for("test", CONDITIONS, seed=3)
    together, apart = images(made, requests, 5), images(made, requests, 2)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images(made, requests[3:4], 64)[0], together[3], rtol=1e-5, atol=1e-5)
    assert together.std(0).max() > 0.1, "the images differ from each other"


def starts(made: SamplingPipeline, requests: list[ImageRequest], batch_size: int) -> list[Frame]:
    return [frame for frame in frames(made, requests, batch_size) if frame.pure_noise]


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_initial_noise_is_equal_in_any_batch_and_for_any_sampler(sampler: str) -> None:
    requests = requests_for("test", CONDITIONS, seed=3)
    made = pipeline_of(sampler=sampler)
    together, *none = starts(made, requests, 64)
    assert not none
    apart = starts(made, requests, 2)
    assert [frame.t for frame in apart] == [20] * 3
    assert torch.equal(together.x_t, torch.cat([frame.x_t for frame in apart]))
    assert torch.equal(together.x_t, ImageNoise([request.key for request in requests], (3, 64, 64), CPU)())


def test_noise_depends_on_seed_file_condition_and_repeat() -> None:
    test, new_test, copies = (requests_for(name, CONDITIONS, seed=0, repeats=n) for name, n in (("test", 1), ("new_test", 1), ("test", 2)))
    keys = [request.key for request in test + new_test]
    assert len(set(keys)) == 10
    assert [request.key for request in copies[::2]] == [request.key for request in test], "more copies do not change the first"
    assert [request.labels for request in copies[::2]] == CONDITIONS
    assert len({request.key for request in copies}) == 10


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        self.images += len(x_t)
        return torch.zeros_like(x_t)


@pytest.mark.parametrize(("guidance", "nfe"), [(0.0, 4), (1.5, 8)])
def test_nfe_equals_the_network_calls_per_image(guidance: float, nfe: int) -> None:
    config, net = Config().replace(timesteps=20, steps=4, guidance=guidance), Counting()
    made = SamplingPipeline(net, Diffusion.of(config.diffusion), config.sampling, ComputeDevice(CPU, "fp32"))
    images(made, requests_for("test", CONDITIONS, seed=0), 2)
    assert made.nfe == nfe == net.images / 5
    assert f"{nfe} network calls" in made.describe()


def test_images_are_the_last_frames_as_uint8() -> None:
    made, requests = pipeline_of(), requests_for("test", CONDITIONS, seed=3)
    spec = sample_images(made, requests, 2)
    progress = []
    while True:
        try:
            progress.append(next(spec))
        except StopIteration as stop:
            finished = stop.value
            break
    assert finished.shape == (5, 3, 64, 64)
    assert torch.equal(finished, to_uint8(images(made, requests, 2)))
    assert [p.done for p in progress] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19, 20]
    assert {p.total for p in progress} == {20}
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
