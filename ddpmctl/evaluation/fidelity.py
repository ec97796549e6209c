"""Fidelity: how close sampled images are to real images of the same labels.

The accuracy asks which objects are in an image. The measures here ask whether the image could be one of the data. Each is taken
twice: for the samples against real images, and for other real images against the same real images. The second value is the floor.
Distances in the features of a classifier are not the FID, which is defined by the Inception network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpmctl.device import without_copy
from ddpmctl.diffusion.randomness import generator
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.progress import Progress
from ddpmctl.statistics.distributions import t_quantile
from ddpmctl.statistics.intervals import LEVEL, Interval

SMALLEST_LEVEL = 16  # side of the last level of the Laplacian pyramid, at least
PATCH = 7  # pixels
PATCHES = 64  # per image and level
DIRECTIONS = 128  # projections of the sliced distance
NEIGHBOURS = 3  # k of precision and recall
GROUPS = 10  # of the jackknife
COARSE = 16  # side at which whole images are compared; there, sharpness does not matter
SHARPNESS_IMAGES = 1500
SHARPNESS_PART = 100  # images at a time
CHUNK = 256  # images per matrix of distances


@dataclass(frozen=True)
class Reference:
    """Real images to compare samples with.

    Attributes:
        first, second: two disjoint sets of real images of the conditions, uint8 (conditions, repeats, 3, H, W).
        training: all training images, uint8 (N, 3, H, W).
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


class Definition(NamedTuple):
    """How a measure is computed (``of``), the range of its values (``low`` to ``high``), its names, and its best value in words."""

    key: str
    name: str
    best: str
    of: Callable[[Images], Statistic]
    low: float = 0.0
    high: float = math.inf

    def interval(self, images: Images) -> Interval:
        """Return the measure of some images with its interval, which is cut at the limits."""
        found = jackknife(self.of(images), images.conditions)
        return Interval(found.estimate, max(found.low, self.low), min(found.high, self.high))


class PreparedReference:
    """Real images with what the measures need of them, computed once for all checkpoints.

    Attributes:
        real: the real images that samples are compared with.
        definitions: the measures of images against ``real``.
    """

    def __init__(self, reference: Reference, classifier: Classifier) -> None:
        """Compute the features of the real images and find the training images that are nearest to them."""
        self._features, self._training = classifier.features, coarse(without_copy(reference.training))
        self.real, self._other = (
            Images(images, self._features, self._training, torch.from_numpy(same).flatten(0, 1) if same.shape[-1] else None)
            for images, same in zip((reference.first, reference.second), reference.excluded, strict=True)
        )
        self.definitions = definitions(self.real)

    @functools.cached_property
    def floors(self) -> tuple[Interval, ...]:
        """The measures of the other real images, in the order of ``definitions``."""
        return tuple(definition.interval(self._other) for definition in self.definitions)

    def images(self, samples: np.ndarray) -> Images:
        """Return samples, uint8 (conditions, repeats, 3, H, W), with the values that the measures use."""
        return Images(samples, self._features, self._training, None)


def measure_fidelity(samples: np.ndarray, prepared: PreparedReference) -> Generator[Progress, None, Fidelity]:
    """Yield progress and return the fidelity of samples, uint8 (conditions, repeats, 3, H, W).

    Patches are scaled by the real images' standard deviation, not each set by its own as in Karras et al. 2018, so that blur counts.
    Both sets hold the same conditions, so the kernel distance of equal sets is a little below 0: compare it with the floor.
    The spread needs at least two images per condition.
    """
    yield Progress("fidelity", 0, 1)
    images, count, measures = prepared.images(samples), len(prepared.definitions), []
    for number, (definition, floor) in enumerate(zip(prepared.definitions, prepared.floors, strict=True), start=1):
        measures.append(Measure(definition.key, definition.name, definition.interval(images), floor, definition.best))
        yield Progress("fidelity", number, count)
    return Fidelity(tuple(measures), len(images.pixels), (power_spectrum(images.pixels), power_spectrum(prepared.real.pixels)))


def definitions(real: Images) -> list[Definition]:
    """Return all measures of images against ``real`` ones."""

    def sliced(side: int) -> Callable[[Images], Statistic]:
        return lambda x: _sliced(x, real, side)

    spread = Definition(
        "spread", "spread within a condition, ratio", "1", lambda x: lambda kept: float(x.spread[kept].mean() / real.spread[kept].mean())
    )  # fmt: skip
    return [
        Definition("laplacian_energy", "Laplacian energy, ratio", "1", lambda x: lambda kept: float(x.energy[kept].mean() / real.energy[kept].mean())),
        *(Definition(f"patch_distance_{side}", f"patch distance at {side}, x 1000", "the floor", sliced(side)) for side in levels(real.pixels.shape[-1])),
        Definition(
            "kernel_distance", "kernel distance, x 1000", "the floor",
            lambda x: lambda kept: 1000 * kernel_distance(x.rows(x.features, kept), real.rows(real.features, kept)), low=-math.inf,
        ),
        Definition("precision", "precision", "the floor", lambda x: lambda kept: coverage(x.rows(x.features, kept), real.rows(real.features, kept)), high=1),
        Definition("recall", "recall", "the floor", lambda x: lambda kept: coverage(real.rows(real.features, kept), x.rows(x.features, kept)), high=1),
        *([spread] if real.repeats > 1 else []),
        Definition(
            "nearest", "nearest training image, ratio of distances", "not below the floor",
            lambda x: lambda kept: float(x.rows(x.nearest, kept).median() / real.rows(real.nearest, kept).median()),
        ),
    ]  # fmt: skip


class Images:
    """Images of all conditions, and the values of each image that the measures use.

    Attributes:
        energy, spread: Laplacian energy, and mean distance between two images: (conditions, repeats) and (conditions,).
        features, nearest: features, and distance to the nearest training image, by image.
        patches: by pyramid level, (images, PATCHES, 147).
    """

    def __init__(self, images: np.ndarray, features: Features, training: Tensor, excluded: Tensor | None) -> None:
        """Compute everything; ``training`` are coarse images, of which those in ``excluded`` do not count as nearest."""
        self.conditions, self.repeats = images.shape[:2]
        self.pixels = torch.from_numpy(np.ascontiguousarray(images)).flatten(0, 1)
        centred = self.pixels.float() / 127.5 - 1
        small = coarse(self.pixels)
        self.features = features(centred)
        self.energy = laplacian_energy(centred).view(self.conditions, self.repeats)
        self.patches = {side: patches(level, side) for side, level in zip(levels(centred.shape[-1]), laplacian_pyramid(centred), strict=True)}
        self.spread = torch.stack([torch.pdist(group).mean() for group in small.view(self.conditions, self.repeats, -1)])
        self.nearest = nearest(small, training, excluded)

    def rows(self, values: Tensor, kept: Tensor) -> Tensor:
        """Return the values (images, ...) of the kept conditions' images."""
        grouped = values.view(self.conditions, self.repeats, *values.shape[1:])
        return grouped[kept].flatten(0, 1)


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


def sharpness(samples: Tensor, requested: Tensor, training: Tensor, labels: Tensor) -> float:
    """Return the samples' Laplacian energy as a ratio of that of training images with as many objects.

    A quick look at what :func:`measure_fidelity` measures with intervals. Where no training image has that many objects, all count.

    Args:
        samples, training: uint8 (B, 3, H, W) and (N, 3, H, W); the first ``SHARPNESS_IMAGES`` training images are used.
        requested, labels: multi-hot (B, C) and (N, C).
    """
    training, counts = training[:SHARPNESS_IMAGES].cpu(), labels[:SHARPNESS_IMAGES].cpu().sum(1)
    # In parts: all of these images as floats would be the most memory that a training needs.
    parts = (training[first : first + SHARPNESS_PART] for first in range(0, len(training), SHARPNESS_PART))
    energy = torch.cat([laplacian_energy(part.float() / 127.5 - 1) for part in parts])
    expected = [float(energy[same].mean() if (same := counts == objects).any() else energy.mean()) for objects in requested.sum(1).long()]
    return float(laplacian_energy(samples.float() / 127.5 - 1).mean()) / (sum(expected) / len(expected))


def laplacian_energy(images: Tensor) -> Tensor:
    """Return the mean square of each image's Laplacian (4 neighbours, mean of the colours), (B,), of images (B, 3, H, W)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(images.mean(1, keepdim=True), kernel[None, None]).square().mean((1, 2, 3))


def levels(size: int) -> tuple[int, ...]:
    """Return the sides of the Laplacian pyramid of images of a size: 64, 32 and 16 for 64."""
    sides = [size]
    while sides[-1] >= 2 * SMALLEST_LEVEL:
        sides.append(sides[-1] // 2)
    return tuple(sides)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Return the Laplacian pyramid of images (B, 3, H, H), one band for each of ``levels``; the last is low-pass (Burt & Adelson 1983)."""
    bands = []
    for _ in levels(images.shape[-1])[1:]:
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


def _sliced(x: Images, real: Images, side: int) -> Statistic:
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
    """Return the share of ``points`` that lie in a ball around a point of ``manifold``; Kynkaanniemi et al. 2019, eq. 2.

    The radius of each ball is the distance of its centre to its k-th nearest neighbour in ``manifold``.

    With samples as points and real images as manifold this is precision, exchanged it is recall.
    """
    k = min(NEIGHBOURS, len(manifold) - 1)
    radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values  # the nearest one is the point itself
    return float((torch.cdist(points, manifold) <= radius).any(1).float().mean())


def coarse(images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) as float32 vectors of their 16x16 averages, scaled so that a distance is in grey levels (root mean square)."""
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


def power_spectrum(images: Tensor) -> np.ndarray:
    """Return the mean power of uint8 images (N, 3, H, W) by spatial frequency, 1 to H / 2 cycles per image, in grey levels squared: (H / 2,)."""
    grey = images.float().mean(1)
    side = grey.shape[-1]
    window = torch.hann_window(side, periodic=False)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * torch.outer(window, window)).abs().square().mean(0) / side**2
    line = torch.fft.fftfreq(side, 1 / side)
    ring = torch.hypot(line[:, None], line[None]).round().long()
    found = [power[ring == radius].mean() for radius in range(1, side // 2 + 1)]
    spectrum: np.ndarray = torch.stack(found).numpy()
    return spectrum
