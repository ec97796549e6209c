"""Several particles for each image: the objects that the network itself recognises in x_t decide between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.iclevr import CLASSES, ICLEVR
from ddpmctl.nets.recognition import AN_OBJECT, FoundObjects
from ddpmctl.registry import NETWORKS, SAMPLERS
from ddpmctl.sampling.pipeline import CHOICE_TIME, Progressing, SamplingPipeline, sample_images, to_uint8
from ddpmctl.sampling.recognition import recognises_objects, require_recogniser
from ddpmctl.sampling.requests import ImageRequest, requests_for
from ddpmctl.sampling.trajectory import record
from tests.conftest import ddpmctl, train

CONTRAST = 0.01  # of a bright image against a dark one, small enough to be decided late
BRIGHT = CLASSES[0]


class TwoImages(nn.Module):
    """The exact denoiser of data that are all bright or all dark, half and half. It ignores the labels, but sees a "red cube" in the bright images.

    Of x_t = signal x0 + noise eps and x0 = +-CONTRAST, E[x0 | x_t] = CONTRAST tanh(z / 2) and log p(bright | x_t) / p(dark | x_t) = z,
    with z = 2 CONTRAST signal / noise^2 sum(x_t).
    """

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        self.schedule, self.images = diffusion.schedule, 0

    def logit(self, x_t: Tensor, time: Tensor) -> Tensor:
        t = (time * self.schedule.timesteps).round().long()
        signal, noise = (torch.as_tensor(level)[t].double() for level in (self.schedule.signal, self.schedule.noise))
        return 2 * CONTRAST * signal / noise**2 * x_t.double().sum((1, 2, 3))

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        self.images += len(x_t)
        x0 = CONTRAST * torch.tanh(self.logit(x_t, time) / 2)
        return x0[:, None, None, None].expand(x_t.shape).float()

    def find_objects(self, x_t: Tensor, time: Tensor) -> FoundObjects:
        self.images += len(x_t)
        logits = torch.full((len(x_t), len(CLASSES), 1, 1), -30.0)
        logits[:, 0, 0, 0] = self.logit(x_t, time).float()
        return FoundObjects(logits)


def pipeline(particles: int, **settings: object) -> SamplingPipeline:
    config = Config().replace(**{"schedule": "cosine", "timesteps": 100, "objective": "x0", "sampler": "ddim", "steps": 20, "particles": particles, **settings})
    diffusion = Diffusion.of(config.diffusion)
    return SamplingPipeline(TwoImages(diffusion), diffusion, config.sampling, ComputeDevice(torch.device("cpu"), "fp32"))


def asked_for(count: int, labels: Sequence[str] = (BRIGHT,)) -> list[ImageRequest]:
    return requests_for("test", [tuple(labels)], seed=5, repeats=count)


def finished(task: Progressing) -> tuple[object, list[int], set[int]]:
    done, totals = [], set()
    while True:
        try:
            progress = next(task)
        except StopIteration as end:
            return end.value, done, totals
        done.append(progress.done)
        totals.add(progress.total)


@pytest.mark.parametrize(
    ("particles", "retry_from", "names", "independent"),
    [
        (1, 1.0, False, 1),
        (2, 1.0, False, 2),
        (4, 1.0, False, 4),
        (4, 0.9, False, 4),
        (16, 0.15, False, 1),
        (17, 0.15, False, 2),
        (4, 0.15, True, 1),
        (5, 0.15, True, 2),
    ],
)
def test_an_image_is_wrong_only_if_all_its_particles_are(particles: int, retry_from: float, names: bool, independent: int) -> None:
    """The two images are told apart without error at the time of the choice, so of n independent particles all are dark with probability 2^-n.

    At t / T = 0.9, x_t hardly shows which image it is (SNR 0.02, z = 0.06), so a particle that is noised again to there is independent of the first.
    At 0.15, it is decided (SNR 17, z = 42): all particles from one noise show the same image. The 17th has new noise, the 5th where labels are just names.
    """
    count, task = 256, replace(ICLEVR, aspects=()) if names else ICLEVR
    images, _, _ = finished(sample_images(replace(pipeline(particles, retry_from=retry_from), task=task), asked_for(count)))
    bright = (images.float().mean((1, 2, 3)) > 127.5).float().mean().item()
    expected = 1 - 0.5**independent
    assert abs(bright - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_absent_objects_count_as_well_as_present_ones() -> None:
    images, _, _ = finished(sample_images(pipeline(4), asked_for(128, [CLASSES[1]])))
    assert (images.float().mean((1, 2, 3)) < 127.5).float().mean() > 0.85


@pytest.mark.parametrize("retry_from", [1.0, 0.7])
@pytest.mark.parametrize("accept", [1.0, 0.9, 0.3])
def test_the_first_accepted_particle_is_kept_or_else_the_likeliest(accept: float, retry_from: float) -> None:
    made, requests = pipeline(6, accept=accept, retry_from=retry_from), asked_for(64)
    (chosen, _, _), likelihoods = finished(made.choose(requests)), []
    calls, time = made.net.images, made.times()[made.choice]
    for number in range(6):
        at_choice = next(frame.x_t for frame in made.frames([replace(r, particle=number) for r in requests]) if frame.t == time)
        logit = made.net.logit(at_choice, torch.full((64,), time / 100))  # type: ignore[operator]
        likelihoods.append(torch.sigmoid(logit - AN_OBJECT))
    numbers = torch.tensor([request.particle for request in chosen])  # type: ignore[attr-defined]
    found = torch.stack(likelihoods)
    enough = (found >= accept) & (accept < 1)
    first = torch.where(enough.any(0), enough.int().argmax(0), found.argmax(0))
    count = torch.where(enough.any(0), first + 1, 6)
    again = torch.tensor([number % made.tries != 0 for number in range(6)])
    steps = made.choice - made.retry * again  # of each particle
    assert calls == sum(int((steps[:tried] + 1).sum()) for tried in count), "one call a step, and one for each particle to look for objects"
    assert torch.allclose(found[numbers, range(64)], found[first, range(64)], atol=1e-5), "large logits have equal probabilities"
    if accept < 1:
        assert torch.equal(numbers[enough.any(0)], first[enough.any(0)])
        assert calls < 0.9 * 64 * int((steps + 1).sum())
    assert (made.retry == 0) == (retry_from == 1.0)
    assert found.min() < 0.1


def test_a_further_particle_is_the_first_one_noised_again() -> None:
    made, request = pipeline(20, retry_from=0.7), asked_for(1)[0]
    schedule, t = made.diffusion.schedule, made.times()[made.retry]
    assert t == 70
    together = [replace(request, particle=number) for number in (0, 1, 2, 15, 16, 17, 19)]
    for row, frame in enumerate(torch.stack([frame.x_t for frame in made.frames(together)], 1)):
        torch.testing.assert_close(frame, torch.cat([frame.x_t for frame in made.frames(together[row : row + 1])]))
    for number in (1, 3, 18):
        first, frames = (list(made.frames([replace(request, particle=each)])) for each in (number - number % made.tries, number))
        for before, frame in zip(first[: made.retry], frames, strict=False):
            assert torch.equal(before.x_t, frame.x_t)
        noise = ImageNoise([(*request.key, "particle", number)], (3, 64, 64), torch.device("cpu"))()
        wanted = float(schedule.signal[t]) * first[made.choice].x0_hat + float(schedule.noise[t]) * noise
        torch.testing.assert_close(frames[made.retry].x_t, wanted)
        assert len(frames) == len(first) == made.steps + 1


class TwoPlaces(TwoImages):
    """As above, but sees two red cubes in the bright images and one in the dark ones."""

    def find_objects(self, x_t: Tensor, time: Tensor) -> FoundObjects:
        logits = torch.full((len(x_t), len(CLASSES), 1, 5), -30.0)
        logits[:, 0, 0, 0] = 30.0
        logits[:, 0, 0, 4] = self.logit(x_t, time).float()
        return FoundObjects(logits)


def test_an_object_that_is_there_twice_is_wrong_unless_the_labels_are_just_names() -> None:
    made, bright = pipeline(4), []
    for task in (ICLEVR, replace(ICLEVR, aspects=())):
        images, _, _ = finished(sample_images(replace(made, net=TwoPlaces(made.diffusion), task=task), asked_for(128)))
        bright.append((images.float().mean((1, 2, 3)) > 127.5).float().mean().item())
    assert bright[0] < 0.15, "all four particles are bright in one image of 16"
    assert bright[1] > 0.3, "nothing to choose by"


class Counting(TwoImages):
    """Sees nothing it could name, but counts one object in the dark images and two in the bright ones."""

    def find_objects(self, x_t: Tensor, time: Tensor) -> FoundObjects:
        return FoundObjects(torch.zeros((len(x_t), len(CLASSES), 1, 1)), 1 + self.logit(x_t, time).sigmoid().float())


@pytest.mark.parametrize("number", [1, 2])
def test_an_image_with_more_or_fewer_objects_than_requested_is_wrong_unless_the_labels_are_just_names(number: int) -> None:
    made, bright = pipeline(4), []
    for task in (ICLEVR, replace(ICLEVR, aspects=())):
        images, _, _ = finished(sample_images(replace(made, net=Counting(made.diffusion), task=task), asked_for(128, CLASSES[:number])))
        bright.append((images.float().mean((1, 2, 3)) > 127.5).float().mean().item())
    assert bright[0] < 0.15 if number == 1 else bright[0] > 0.85, "of four particles, one has the requested number in 15 images of 16"
    assert 0.3 < bright[1] < 0.7, "nothing to choose by"


@pytest.mark.parametrize(("accept", "retry_from"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (0.5, 0.7)])
@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_the_choice_does_not_depend_on_the_batch_and_the_image_is_that_of_its_noise(sampler: str, accept: float, retry_from: float) -> None:
    made, requests = pipeline(6, sampler=sampler, accept=accept, retry_from=retry_from), asked_for(9)
    (together, _, _), apart = finished(made.choose(requests)), [finished(made.choose(requests[i : i + 2]))[0] for i in (0, 2, 4, 6, 8)]
    assert together == [request for part in apart for request in part]  # type: ignore[attr-defined]
    assert len({request.particle for request in together}) > 1, "some first particles were not kept"  # type: ignore[attr-defined]
    *_, last = made.frames(together)  # type: ignore[arg-type]
    images, done, totals = finished(sample_images(made, requests, 4))
    assert torch.equal(images, to_uint8(last.x_t))
    assert totals == {9 * made.work}
    assert done == sorted(done)
    assert done[-1] == 9 * made.work


@pytest.mark.parametrize("retry_from", [1.0, 0.7])
def test_a_trajectory_of_the_kept_particle_ends_in_its_image(retry_from: float) -> None:
    made, requests = pipeline(3, retry_from=retry_from), asked_for(4)
    chosen, _, _ = finished(made.choose(requests))
    recorded, done, totals = finished(record(made, chosen))  # type: ignore[arg-type]
    images, _, _ = finished(sample_images(made, requests))
    assert (recorded[-1].x_t == images.permute(0, 2, 3, 1).numpy()).all()  # type: ignore[index]
    assert len(recorded) == made.steps + 1  # type: ignore[arg-type]
    assert (done[-1], totals) == (made.steps, {made.steps})


@pytest.mark.parametrize("retry_from", [1.0, 0.6])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("particles", [1, 3, 6])
def test_nfe_counts_the_calls_of_all_particles(particles: int, steps: int, guidance: float, retry_from: float) -> None:
    settings = {"steps": steps, "guidance": guidance, "guidance_to": 0.8, "retry_from": retry_from}
    made = pipeline(particles, **settings)
    finished(sample_images(made, asked_for(2)))
    assert made.net.images == 2 * made.nfe
    assert f": {made.nfe} network calls" in made.describe()
    assert (f"of {particles} particles" in made.describe()) == (particles > 1)
    limited = pipeline(particles, accept=0.5, **settings)
    assert limited.nfe == made.nfe
    assert (f": at most {made.nfe} network calls" in limited.describe()) == (particles > 1)
    assert (f"of at most {particles} particles, accepted at 0.5" in limited.describe()) == (particles > 1)
    assert ("noised again to t / T = 0.6" in limited.describe()) == (particles > 1 and retry_from < 1)


def test_a_choice_comes_after_the_shapes_are_decided_and_before_the_last_step() -> None:
    for steps, retry_from in itertools.product((1, 2, 5, 24, 100), (0.05, 0.7, 1.0)):
        made = pipeline(2, steps=steps, retry_from=retry_from)
        times = made.times()[: made.choice + 1]
        assert times[-1] > 0
        assert times[-1] <= CHOICE_TIME * 100 or steps < 10
        assert all(t > CHOICE_TIME * 100 for t in times[:-1])
        assert made.retry == 0 or made.retry < made.choice, "a further particle takes at least one step"


@pytest.mark.parametrize("net", NETWORKS.names())
def test_networks_that_do_not_recognise_objects_are_refused(net: str) -> None:
    config = Config().replace(net=net, particles=2, objective="x0", label_loss=0.1)
    if recognises_objects(net):
        require_recogniser(config)
        with pytest.raises(UsageError, match="--particles: a network trained with --label-loss 0 does not recognise objects"):
            require_recogniser(config.replace(label_loss=0.0))
    else:
        with pytest.raises(UsageError, match=f"--particles: the network {net} does not recognise objects"):
            require_recogniser(config)
    require_recogniser(config.replace(particles=1, label_loss=0.0))


FINE = ["--net", "fine-unet", "--schedule", "cosine", "--objective", "x0", "--label-loss", "0.1", "--sampler", "dpm++2m", "--timesteps", "20", "--steps", "6"]


@pytest.fixture(scope="module")
def fine_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``fine-unet`` that samples with three particles."""
    return train(tmp_path_factory.mktemp("fine"), *FINE, "--particles", "3", "--epochs", "2")


def test_the_commands_sample_with_the_particles_of_the_checkpoint(fine_run: Path, tmp_path: Path) -> None:
    result = ddpmctl("sample", fine_run, "--labels", "red cube", "--labels", "blue sphere", "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "one of 3 particles" in result.stderr
    (checkpoint,) = sorted((fine_run / "checkpoints").glob("epoch2_*.pth"))
    loaded = load_checkpoint(checkpoint)
    made = pipeline_for(loaded, {}, ComputeDevice(torch.device("cpu"), "fp32"))
    requests = requests_for("sample", [("red cube",), ("blue sphere",)], seed=0)
    chosen, _, _ = finished(made.choose(requests))
    apart = [finished(made.choose([request]))[0][0] for request in requests]  # type: ignore[index]
    assert chosen == apart, "the choice does not depend on the batch"


def test_results_of_other_particles_are_not_taken_from_the_cache(fine_run: Path, tmp_path: Path) -> None:
    result = ddpmctl("evaluate", fine_run, "--sweep", "particles=1,3", "--csv", tmp_path / "s.csv", "--figures", tmp_path)
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "s.csv").read_text().splitlines()
    assert {row.split(",")[rows[0].split(",").index("particles")] for row in rows[1:]} == {"1", "3"}


def test_arms_with_other_particles_are_not_compared(fine_run: Path, run: Path, tmp_path: Path) -> None:
    arms = ("compare", fine_run, run, "--out", tmp_path / "c.png")
    result = ddpmctl(*arms)
    assert result.exit_code == 2
    assert "particles 3 against 1" in result.stderr
    assert "--particles 1" in result.stderr
    refused = ddpmctl(*arms, "--particles", 3)
    assert refused.exit_code == 2
    assert "error: --particles: the network context-unet does not recognise objects" in refused.stderr
