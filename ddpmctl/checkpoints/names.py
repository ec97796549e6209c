"""Names in and of checkpoints: files such as ``epoch315_0.625_0.619.pth`` (epoch, accuracies on up to two condition files), exported folders, the format."""

from __future__ import annotations

import re
from pathlib import Path

FORMAT = "ddpmctl checkpoint 1"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of an exported folder
PRETRAINED_NAME = "pretrained"
"""How commands call the model that comes with ddpmctl. A run or a file that has this name is taken instead."""
PRETRAINED = Path(__file__).with_name("assets") / "quick"
"""The folder of that model, as ``export`` writes it."""
FILE_NAME = re.compile(r"epoch(?P<epoch>\d+)(?:_(?P<test>\d(?:\.\d+)?)(?:_(?P<new_test>\d(?:\.\d+)?))?)?\.pth")


def recorded_in_name(path: Path) -> dict[str, float]:
    """Return epoch and accuracies of a file name such as ``epoch315_0.625_0.619.pth``, else an empty dict."""
    match = FILE_NAME.fullmatch(path.name)
    return {name: float(text) for name, text in match.groupdict().items() if text is not None} if match else {}


def short_name(path: Path) -> str:
    """Return what a checkpoint is called where its run does not matter: ``pretrained``, the folder of an exported model, or the file's name."""
    if path == PRETRAINED / WEIGHTS:
        return PRETRAINED_NAME
    return path.absolute().parent.name if path.name == WEIGHTS else path.name
