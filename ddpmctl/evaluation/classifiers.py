"""Multi-label classifiers that look at an image and name its objects: the one that comes with the program, and the lab's."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.checkpoints.untrusted import Declared, TensorFile, checked, open_tensors
from ddpmctl.errors import DataError
from ddpmctl.labels import CLASSES

BUILT_IN = "built-in"
FORMAT = "ddpmctl evaluator 1"
LAB_FILE = "checkpoint.pth"  # the name under which the lab hands its classifier out
BATCH = 32  # images to a call of the network; a fixed shape, so that an image's answer does not depend on its neighbours
STEM, MIDDLE, TOP = 48, 80, 192  # channels at 32x32, 16x16 and 8x8
PRIOR = -4.0  # the logit that a cell of the grid starts with: most classes are absent


@dataclass(frozen=True)
class Classifier:
    """A classifier ready to be asked.

    Attributes:
        name: "built-in" or the file's path.
        sha256: of the weight file.
        net: (B, 3, 64, 64) in [-1, 1] to probabilities (B, 24); in evaluation mode.
    """

    name: str
    sha256: str
    net: nn.Module

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the probability of each class, float32 (B, 24) on the CPU.

        Computed in float32 whatever the caller's autocast, and image by image the same however they are batched.

        Args:
            images: (B, 3, 64, 64) float in [-1, 1], on any device.
        """
        device = next(self.net.parameters()).device
        out = torch.empty(len(images), len(CLASSES))
        with torch.autocast(device.type, enabled=False), _plain_float32(device):
            for first in range(0, len(images), BATCH):
                part = images[first : first + BATCH].to(device, torch.float32)
                filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, BATCH - len(part))).contiguous(memory_format=torch.channels_last)
                out[first : first + BATCH] = self.net(filled)[: len(part)].float().cpu()
        return out

    def describe(self) -> str:
        """Return the name with the beginning of the hash."""
        return f"{self.name} ({self.sha256[:12]})"

    def to(self, device: torch.device | str) -> Classifier:
        """Return the same classifier on another device; this one stays where it is."""
        return replace(self, net=copy.deepcopy(self.net).to(device))


class CompactClassifier(nn.Module):
    """A small residual network, (B, 3, 64, 64) in [-1, 1] to logits (B, 24).

    Each cell of an 8x8 grid says which classes it sees, and an image shows what any of its cells does: log-sum-exp over the
    cells, a smooth maximum, as fits labels that say what is there and not where (Pinheiro & Collobert 2015).
    """

    def __init__(self) -> None:
        """Draw new weights from torch's global generator."""
        super().__init__()
        self.stem = ConvNorm(3, STEM, 5, stride=2)
        self.blocks = nn.Sequential(Block(STEM, MIDDLE, stride=2), Block(MIDDLE, MIDDLE), Block(MIDDLE, TOP, stride=2))
        self.head = nn.Conv2d(TOP, len(CLASSES), 1)
        nn.init.constant_(self.head.bias, PRIOR)  # type: ignore[arg-type]
        with torch.no_grad():
            self.head.weight.mul_(0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 24)."""
        cells = self.head(self.blocks(F.relu(self.stem(images))))  # (B, 24, 8, 8)
        return torch.logsumexp(cells.float().flatten(2), dim=2)


class ConvNorm(nn.Module):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1) -> None:
        """Take channels before and after, the kernel's side, and the stride."""
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
        """Take channels before and after, and the stride."""
        super().__init__()
        self.first = ConvNorm(before, after, 3, stride)
        self.second = ConvNorm(after, after, 3)
        self.skip = nn.Identity() if (before, stride) == (after, 1) else nn.Sequential(nn.AvgPool2d(stride), ConvNorm(before, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, after, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


def load_classifier(path: Path | None = None, root: Path | None = None, device: torch.device | str = "cpu") -> Classifier:
    """Return the classifier of a file; without one the lab's if it lies in the data folder, else the built-in one.

    Args:
        path: a file in the lab's format or in ours.
        root: the data folder, in which the lab's ``checkpoint.pth`` is found by itself.
        device: where it computes.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged, or holds something else than a classifier of the 24 classes.
    """
    if path is None and root is not None and (root / LAB_FILE).is_file():
        path = root / LAB_FILE
    name = BUILT_IN if path is None else str(path)
    with contextlib.nullcontext(_built_in()) if path is None else open_tensors(path) as file:
        with torch.random.fork_rng(devices=[]):  # a new network draws weights, which the file's replace
            net, key = _network(name, file.outline)
        _check_shapes(net, file.outline.get(key), name)
        weights = file.load()[key]
    bad = next((part for part, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()), None)
    if bad is not None:
        raise DataError(f"{name}: the weights {bad!r} are not finite")
    net.load_state_dict(weights)
    if isinstance(net, CompactClassifier):
        net = classifier_from(net).net
    net = net.eval().requires_grad_(requires_grad=False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Classifier(name, file.sha256, net)


def classifier_from(net: CompactClassifier, name: str = "in training", sha256: str = "") -> Classifier:
    """Return a classifier in training as an evaluator; the network itself is copied and left as it is."""
    return Classifier(name, sha256, nn.Sequential(copy.deepcopy(net), nn.Sigmoid()).eval().requires_grad_(requires_grad=False))


def _built_in() -> TensorFile:
    data = (importlib.resources.files("ddpmctl.evaluation") / "assets" / "compact.pt").read_bytes()
    return checked(io.BytesIO(data), BUILT_IN)


def _network(name: str, outline: Any) -> tuple[nn.Module, str]:
    """Return the network that a file's content is for, with weights of no meaning, and the key of those in the file."""
    if isinstance(outline, dict) and outline.get("format") == FORMAT:
        return CompactClassifier(), "weights"
    if isinstance(outline, dict) and isinstance(outline.get("model"), dict):
        return lab_network(), "model"
    raise DataError(f'{name}: holds neither the lab\'s classifier (a state dict under "model") nor a ddpmctl one')


def lab_network() -> nn.Module:
    """Return the lab's classifier, torchvision's ResNet18 (He et al. 2016) under 24 sigmoids, with random weights."""
    from torchvision.models import resnet18

    net: nn.Module = resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, len(CLASSES)), nn.Sigmoid())
    return net


def _check_shapes(net: nn.Module, declared: Any, name: str) -> None:
    """Compare the weights that a file declares with a network's: all there, of the right shapes, and no others."""
    kind = "ddpmctl classifier" if isinstance(net, CompactClassifier) else "lab's ResNet18 classifier"
    if not isinstance(declared, dict) or not all(isinstance(value, Declared) for value in declared.values()):
        raise DataError(f"{name}: holds other things than tensors where the weights of a {kind} should be")
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    wrong = [key for key, shape in shapes.items() if key not in declared or declared[key].shape != shape] + [key for key in declared if key not in shapes]
    if wrong:
        raise DataError(f"{name}: the weights are not those of a {kind} ({len(wrong)} differ, the first is {wrong[0]!r})")


def _plain_float32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a GPU computes convolutions in true float32 and always alike."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


__all__ = ["BUILT_IN", "FORMAT", "LAB_FILE", "CompactClassifier", "Classifier", "classifier_from", "lab_network", "load_classifier"]
