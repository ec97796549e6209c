"""Fidelity: how close sampled images are to real images of the same labels.

The accuracy asks which objects are in an image. The measures here ask whether the image could be one of the data. Each is taken
twice: for the samples against real images, and for other real images against the same real images. The second value is the floor.
Distances in the features of a classifier are not the FID, which is defined by the Inception network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpmctl.diffusion.randomness import generator
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.progress import Progress
from ddpmctl.statistics.distributions import t_quantile
from ddpmctl.statistics.intervals import LEVEL, Interval

LEVELS = (64, 32, 16)  # sides of the Laplacian pyramid
PATCH = 7  # pixels
PATCHES = 64  # per image and level
DIRECTIONS = 128  # projections of the sliced distance
NEIGHBOURS = 3  # k of precision and recall
GROUPS = 10  # of the jackknife
COARSE = 16  # side at which whole images are compared; there, sharpness does not matter
CHUNK = 256  # images per matrix of distances


@dataclass(frozen=True)
class Reference:
    """Real images to compare samples with.

    Attributes:
        first, second: two disjoint sets of real images of the conditions, uint8 (conditions, repeats, 3, 64, 64).
        training: all training images, uint8 (N, 3, 64, 64).
        excluded: training images that are not compared with a real image, because they show the same scene: (2, conditions, repeats, E) indices,
            or E = 0 where the real images are not training images.
    """

    first: np.ndarray
    second: np.ndarray
    training: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True)
class Measure:
    """One measure with its 95 % interval, and the same of real images.

    Attributes:
        key, name: in JSON, and as shown in tables.
        samples, floor: the samples' and the other real images' value.
        best: in words, what a good value is.
    """

    key: str
    name: str
    samples: Interval
    floor: Interval
    best: str


@dataclass(frozen=True)
class Fidelity:
    """All measures of one checkpoint's images; ``spectra`` are the mean power by spatial frequency of samples and real images."""

    measures: tuple[Measure, ...]
    images: int
    spectra: tuple[np.ndarray, np.ndarray]


Features = Callable[[Tensor], Tensor]
Statistic = Callable[[Tensor], float]
"""(indices of the conditions) -> the statistic of these conditions' images."""


def measure_fidelity(samples: np.ndarray, reference: Reference, classifier: Classifier) -> Generator[Progress, None, Fidelity]:
    """Yield progress and return the fidelity of samples, uint8 (conditions, repeats, 3, 64, 64).

    Patches are scaled by the real images' standard deviation, not each set by its own as in Karras et al. 2018, so that blur counts.
    Both sets hold the same conditions, so the kernel distance of equal sets is a little below 0: compare it with the floor.
    The spread needs at least two images per condition.
    """
    sets = [_Images(array, classifier.features) for array in (samples, reference.first, reference.second)]
    made, real, other = sets
    total, done = len(LEVELS) + 6, 0
    measures = []

    def add(key: str, name: str, best: str, statistic: Callable[[_Images], Statistic]) -> Progress:
        nonlocal done
        measures.append(Measure(key, name, jackknife(statistic(made), real.conditions), jackknife(statistic(other), real.conditions), best))
        done += 1
        return Progress("fidelity", done, total)

    yield Progress("fidelity", 0, total)
    yield add("laplacian_energy", "Laplacian energy, ratio", "1", lambda x: lambda kept: float(x.energy[kept].mean() / real.energy[kept].mean()))
    for side in LEVELS:
        yield add(f"patch_distance_{side}", f"patch distance at {side}, x 1000", "the floor", lambda x, side=side: _sliced(x, real, side))  # type: ignore[misc]
    yield add(
        "kernel_distance",
        "kernel distance, x 1000",
        "the floor",
        lambda x: lambda kept: 1000 * kernel_distance(x.rows(x.features, kept), real.rows(real.features, kept)),
    )
    yield add("precision", "precision", "the floor", lambda x: lambda kept: coverage(x.rows(x.features, kept), real.rows(real.features, kept)))
    yield add("recall", "recall", "the floor", lambda x: lambda kept: coverage(real.rows(real.features, kept), x.rows(x.features, kept)))
    spread = [x.spread() for x in sets]
    if real.repeats > 1:
        ratios = {id(x): s for x, s in zip(sets, spread, strict=True)}
        yield add("spread", "spread within a condition, ratio", "1", lambda x: lambda kept: float(ratios[id(x)][kept].mean() / ratios[id(real)][kept].mean()))
    training = coarse(torch.from_numpy(reference.training))
    near = {id(made): nearest(made.coarse(), training, None), id(real): _nearest_real(real, training, reference.excluded[0]),
            id(other): _nearest_real(other, training, reference.excluded[1])}  # fmt: skip
    yield add(
        "nearest", "nearest training image, ratio of distances", "not below the floor",
        lambda x: lambda kept: float(x.rows(near[id(x)], kept).median() / real.rows(near[id(real)], kept).median()),
    )  # fmt: skip
    yield Progress("fidelity", total, total)
    return Fidelity(tuple(measures), len(made.pixels), (power_spectrum(made.pixels), power_spectrum(real.pixels)))


class _Images:
    """Images of all conditions with what the measures need of them, computed once."""

    def __init__(self, images: np.ndarray, features: Features) -> None:
        self.conditions, self.repeats = images.shape[:2]
        self.pixels = torch.from_numpy(np.ascontiguousarray(images)).flatten(0, 1)
        centred = self.pixels.float() / 127.5 - 1
        self.features = features(centred)
        self.energy = laplacian_energy(centred).view(self.conditions, self.repeats)
        self.patches = {side: patches(level, side) for side, level in zip(LEVELS, laplacian_pyramid(centred), strict=True)}

    def rows(self, values: Tensor, kept: Tensor) -> Tensor:
        """Return the values (images, ...) of the kept conditions' images."""
        grouped = values.view(self.conditions, self.repeats, *values.shape[1:])
        return grouped[kept].flatten(0, 1)

    def coarse(self) -> Tensor:
        return coarse(self.pixels)

    def spread(self) -> Tensor:
        """Return the mean distance between two images of each condition, (conditions,); NaN for one image."""
        grouped = self.coarse().view(self.conditions, self.repeats, -1)
        return torch.stack([torch.pdist(group).mean() for group in grouped])


def jackknife(statistic: Statistic, conditions: int) -> Interval:
    """Return a statistic of all conditions with its interval by the delete-a-group jackknife (Kott 2001).

    Conditions are left out in groups of nearly equal size, with all their images.
    """
    every = torch.arange(conditions)
    estimate = statistic(every)
    groups = min(GROUPS, conditions)
    if groups < 2:
        return Interval(estimate, -math.inf, math.inf)
    without = np.array([statistic(every[every % groups != group]) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    reach = t_quantile((1 + LEVEL) / 2, groups - 1) * error
    return Interval(estimate, estimate - reach, estimate + reach)


def laplacian_energy(images: Tensor) -> Tensor:
    """Return the mean square of each image's Laplacian (4 neighbours, mean of the colours), (B,), of images (B, 3, H, W)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(images.mean(1, keepdim=True), kernel[None, None]).square().mean((1, 2, 3))


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Return the bands of ``LEVELS``, the last one being what is left (Burt & Adelson 1983), of images (B, 3, 64, 64)."""
    bands = []
    for _ in LEVELS[1:]:
        smaller = F.avg_pool2d(_blur(images), 2)
        bands.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    return [*bands, images]


def _blur(images: Tensor) -> Tensor:
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2,) * 4, mode="reflect"), kernel, groups=3)


def patches(band: Tensor, side: int) -> Tensor:
    """Return ``PATCHES`` patches of each image at random places, the same for every set: (B, PATCHES, 3 * 49)."""
    random = generator(0, "patches", side)
    places = torch.randint(0, side - PATCH + 1, (PATCHES, 2), generator=random)
    cut = [band[:, :, top : top + PATCH, left : left + PATCH].flatten(1) for top, left in places.tolist()]
    return torch.stack(cut, 1)


def _sliced(x: _Images, real: _Images, side: int) -> Statistic:
    """Return the sliced Wasserstein distance x 1000 between the patches of two sets."""
    directions = F.normalize(torch.randn((3 * PATCH**2, DIRECTIONS), generator=generator(0, "directions", side)), dim=0)
    scale = real.patches[side].std()
    projected = [(images.patches[side] / scale) @ directions for images in (x, real)]  # (B, PATCHES, DIRECTIONS)

    def statistic(kept: Tensor) -> float:
        a, b = (images.rows(values, kept).flatten(0, 1).T.sort(1).values for images, values in zip((x, real), projected, strict=True))
        return 1000 * float((a - b).abs().mean())

    return statistic


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / F + 1)^3; Binkowski et al. 2018, eq. 4. Features (N, F) and (M, F)."""
    aa, bb, ab = ((x.double() @ y.double().T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    own = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (aa, bb))
    return float(own - 2 * ab.mean())


def coverage(points: Tensor, manifold: Tensor) -> float:
    """Return the share of ``points`` within the distance of some manifold point to its k-th neighbour; Kynkaanniemi et al. 2019, eq. 2.

    With samples as points and real images as manifold this is precision, exchanged it is recall.
    """
    k = min(NEIGHBOURS, len(manifold) - 1)
    radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values  # the nearest one is the point itself
    return float((torch.cdist(points, manifold) <= radius).any(1).float().mean())


def coarse(images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, 64, 64) as float32 vectors of their 16x16 averages, scaled so that a distance is in grey levels (root mean square)."""
    parts = [F.adaptive_avg_pool2d(part.float(), COARSE).flatten(1) for part in torch.split(images, 4096)]
    small = torch.cat(parts)
    return small / math.sqrt(small.shape[1])


def nearest(points: Tensor, others: Tensor, excluded: Tensor | None) -> Tensor:
    """Return the distance of each point to the nearest of ``others``, (N,); ``excluded`` (N, E) are indices that do not count."""
    found = []
    for start in range(0, len(points), CHUNK):
        distances = torch.cdist(points[start : start + CHUNK], others)
        if excluded is not None:
            distances.scatter_(1, excluded[start : start + CHUNK], math.inf)
        found.append(distances.min(1).values)
    return torch.cat(found)


def _nearest_real(images: _Images, training: Tensor, excluded: np.ndarray) -> Tensor:
    return nearest(images.coarse(), training, torch.from_numpy(excluded).flatten(0, 1) if excluded.shape[-1] else None)


def power_spectrum(images: Tensor) -> np.ndarray:
    """Return the mean power of uint8 images (N, 3, 64, 64) by spatial frequency, 1 to 32 cycles per image, in grey levels squared: (32,)."""
    grey = images.float().mean(1)
    side = grey.shape[-1]
    window = torch.hann_window(side, periodic=False)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * torch.outer(window, window)).abs().square().mean(0) / side**2
    line = torch.fft.fftfreq(side, 1 / side)
    ring = torch.hypot(line[:, None], line[None]).round().long()
    found = [power[ring == radius].mean() for radius in range(1, side // 2 + 1)]
    spectrum: np.ndarray = torch.stack(found).numpy()
    return spectrum
