"""Multi-label classifiers of the objects in an image: the built-in one and the lab's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.checkpoints.format import usable_weights
from ddpmctl.checkpoints.untrusted import mismatches
from ddpmctl.errors import DataError
from ddpmctl.evaluation.classifier_file import KnownClassifier, about_classifier, open_classifier
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

FORMAT = "ddpmctl evaluator 1"
BATCH = 32  # images per network call; a fixed shape, so that outputs do not depend on the batch
STEM, MIDDLE, TOP = 48, 80, 192  # channels at 32x32, 16x16 and 8x8 of images of 64x64
FINEST, COARSEST = 32, 8  # sides: of the first map at least, and of the last one
PRIOR = -4.0  # initial logit of a grid cell: most classes are absent


@dataclass(frozen=True)
class Classifier(KnownClassifier):
    """A classifier for evaluation.

    Attributes:
        net: images (B, 3, H, W) in [-1, 1] to probabilities (B, C); in evaluation mode.
    """

    net: nn.Module

    def __call__(self, images: Tensor) -> Tensor:
        """Return class probabilities, float32 (B, C) on the CPU, of images (B, 3, H, W) in [-1, 1] on any device.

        Outputs do not depend on the caller's autocast or on the batch.
        """
        return self._in_batches(self.net, images, self.task.columns)

    def features(self, images: Tensor) -> Tensor:
        """Return the last feature map's mean over positions, float32 (B, F) on the CPU: 192 built-in features, 512 of the lab's network."""
        found: list[Tensor] = []
        last = self._last_feature_map()
        handle = last.register_forward_hook(lambda module, args, out: found.append(out.mean((2, 3))))

        def embed(batch: Tensor) -> Tensor:
            self.net(batch)
            return found.pop()

        try:
            return self._in_batches(embed, images, self.feature_count)
        finally:
            handle.remove()

    @property
    def feature_count(self) -> int:
        """F, the size of ``features``."""
        net = self._bare
        head = net.head if isinstance(net, CompactClassifier) else net.fc[0]
        return int(head.weight.shape[1])

    def _last_feature_map(self) -> nn.Module:
        net = self._bare
        layer: nn.Module = net.blocks if isinstance(net, CompactClassifier) else net.layer4
        return layer

    @property
    def _bare(self) -> Any:
        """The network without the sigmoid that follows the built-in one."""
        return self.net[0] if isinstance(self.net, nn.Sequential) else self.net

    @torch.inference_mode()
    def _in_batches(self, net: Callable[[Tensor], Tensor], images: Tensor, width: int) -> Tensor:
        device = next(self.net.parameters()).device
        out = torch.empty(len(images), width)
        with torch.autocast(device.type, enabled=False), _plain_float32(device):
            for first in range(0, len(images), BATCH):
                part = images[first : first + BATCH].to(device, torch.float32)
                filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, BATCH - len(part))).contiguous(memory_format=torch.channels_last)
                out[first : first + BATCH] = net(filled)[: len(part)].float().cpu()
        return out


class CompactClassifier(nn.Module):
    """A small residual network, images (B, 3, H, W) in [-1, 1] to logits (B, C).

    Each cell of a coarse grid, 8x8 for images of 64x64, has class logits. Their log-sum-exp, a smooth maximum, is the image's logit
    (Pinheiro & Collobert 2015): labels say which objects are present, but not where. Of other sizes, images of 32x32 are not halved by the first
    convolution, and those of more than 96x96 are halved by further blocks, so that the grid is 8x8 or, of 96x96, 12x12.
    """

    def __init__(self, task: Task = ICLEVR) -> None:
        """Create random weights from torch's global generator."""
        super().__init__()
        stride = 2 if task.size > FINEST else 1
        further = [Block(STEM, STEM, stride=2) for _ in range(max(0, (task.size // (COARSEST * 8)).bit_length() - 1))]
        self.stem = ConvNorm(3, STEM, 5, stride=stride)
        self.blocks = nn.Sequential(*further, Block(STEM, MIDDLE, stride=2), Block(MIDDLE, MIDDLE), Block(MIDDLE, TOP, stride=2))
        self.head = nn.Conv2d(TOP, task.columns, 1)
        nn.init.constant_(self.head.bias, PRIOR)  # type: ignore[arg-type]
        with torch.no_grad():
            self.head.weight.mul_(0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C)."""
        cells = self.head(self.blocks(F.relu(self.stem(images))))  # (B, C, 8, 8)
        return torch.logsumexp(cells.float().flatten(2), dim=2)


class ConvNorm(nn.Module):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1) -> None:
        """Create a convolution from ``before`` to ``after`` channels with a kernel of ``size``."""
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, after, H / stride, W / stride)."""
        out: Tensor = self.norm(self.conv(x))
        return out


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        """Create a block from ``before`` to ``after`` channels."""
        super().__init__()
        self.first = ConvNorm(before, after, 3, stride)
        self.second = ConvNorm(after, after, 3)
        self.skip = nn.Identity() if (before, stride) == (after, 1) else nn.Sequential(nn.AvgPool2d(stride), ConvNorm(before, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, after, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


def load_classifier(path: Path | None = None, root: Path | None = None, device: torch.device | str = "cpu", task: Task | None = None) -> Classifier:
    """Return a classifier; arguments and errors are those of ``open_classifier``, and DataError also where the file is no classifier."""
    with open_classifier(path, root, task) as file:
        name = file.name
        own, warning = about_classifier(file)
        with torch.random.fork_rng(devices=[]):  # initialisation draws random weights
            net, key = _network(name, file.outline, own)
        _check_shapes(net, file.outline.get(key), name)
        net.load_state_dict(usable_weights(net, file.load()[key], name))
    if isinstance(net, CompactClassifier):
        net = classifier_from(net, own).net
    net = net.eval().requires_grad_(requires_grad=False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Classifier(name, file.sha256, net, task=own, warning=warning)


def classifier_from(net: nn.Module, task: Task = ICLEVR) -> Classifier:
    """Return a classifier with a copy of a network that returns logits."""
    return Classifier("in training", "", nn.Sequential(copy.deepcopy(net), nn.Sigmoid()).eval().requires_grad_(requires_grad=False), task=task)


def _network(name: str, outline: Any, task: Task) -> tuple[nn.Module, str]:
    """Return an uninitialised network for a file's content, and the key of the weights in the file."""
    if isinstance(outline, dict) and outline.get("format") == FORMAT:
        return CompactClassifier(task), "weights"
    if isinstance(outline, dict) and isinstance(outline.get("model"), dict):
        return lab_network(task), "model"
    raise DataError(f'{name}: is neither the lab\'s classifier (a state dict under "model") nor a ddpmctl classifier')


def lab_network(task: Task = ICLEVR) -> nn.Module:
    """Return the lab's classifier with random weights: ResNet18 (He et al. 2016) with a sigmoid output for each class."""
    from torchvision.models import resnet18

    net: nn.Module = resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, task.columns), nn.Sigmoid())
    return net


def _check_shapes(net: nn.Module, declared: Any, name: str) -> None:
    """Check that a file declares exactly the network's weights, with the same shapes."""
    kind = "ddpmctl classifier" if isinstance(net, CompactClassifier) else "lab's ResNet18 classifier"
    try:
        wrong = mismatches(net, declared)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
    if wrong:
        raise DataError(f"{name}: the weights are not those of a {kind} ({len(wrong)} differ, the first is {wrong[0]!r})")


def _plain_float32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which cuDNN is deterministic and does not use TF32."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
