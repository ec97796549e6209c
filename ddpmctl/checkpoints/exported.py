"""A checkpoint as a folder that other programs read: ``model.safetensors``, the weights, and ``config.json``, everything else.

The form of safetensors holds no code. Its header is checked by its own library; settings and shapes are then checked as those of every checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpmctl.checkpoints.contents import MAX_PICKLE_BYTES, Declared
from ddpmctl.checkpoints.names import CONFIG, FORMAT, WEIGHTS
from ddpmctl.checkpoints.untrusted import TensorFile, open_regular, open_tensors
from ddpmctl.data.folders import parse_json, read_bytes
from ddpmctl.errors import DataError, out_of_memory
from ddpmctl.files import json_text, write_text, write_verified
from ddpmctl.iclevr import ICLEVR

if TYPE_CHECKING:
    from torch import Tensor

    from ddpmctl.checkpoints.outline import CheckpointOutline

STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage", "BOOL": "BoolStorage",
}  # fmt: skip


@dataclass(frozen=True)
class ExportedFile(TensorFile):
    """The weights and settings of an exported folder."""

    def vector(self, tensor: Declared) -> np.ndarray | None:
        """Return None: only the schedules of other programs' files are read this way."""
        return None

    def load(self) -> Any:
        """Return the content with its tensors on the CPU."""
        import safetensors.torch

        self._file.seek(0)
        return {**self.outline, "weights": safetensors.torch.load(self._file.read())}


@contextmanager
def open_checkpoint(path: Path) -> Iterator[TensorFile]:
    """Open and check a checkpoint: a ``.pth`` file, or the ``.safetensors`` file of an exported folder.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, is damaged, or is not a file of tensors.
    """
    if path.suffix == ".safetensors":
        yield _exported(path)
    else:
        with open_tensors(path) as file:
            yield file


def write_exported(folder: Path, outline: CheckpointOutline, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's weights, bit for bit, and its settings into a folder.

    Raises:
        UsageError: the folder cannot be written to, or the disk is full.
    """
    import safetensors.torch

    scores = {name: {"accuracy": accuracy} for name, accuracy in outline.recorded.items()}
    own = {} if outline.task == ICLEVR else {"task": outline.task.to_dict()}
    known = {"epoch": outline.epoch, "loss": outline.loss, "scores": scores}
    data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in weights.items()}, {"format": "pt"})
    write_verified(folder / WEIGHTS, data)
    write_text(folder / CONFIG, json_text({"format": FORMAT, "config": outline.config.to_dict(), "known": known, **own}) + "\n")


def _exported(path: Path) -> ExportedFile:
    import safetensors

    with open_regular(path) as file:
        data = file.read()
    settings = path.with_name(CONFIG)
    raw = read_bytes(settings)
    content = parse_json(raw, settings)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "weights" in content:
        raise DataError(f"{settings}: is not that of an exported ddpmctl checkpoint")
    try:
        if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > MAX_PICKLE_BYTES:
            raise ValueError("its header is missing or too long")
        weights = {name: _declared(about) for name, about in safetensors.deserialize(data)}  # type: ignore[no-untyped-call]
    except Exception as error:  # a damaged file can raise any error
        if out_of_memory(error):
            raise
        raise DataError(f"{path}: is not a file of safetensors, or is damaged ({error})") from None
    digest = hashlib.sha256(data)
    digest.update(raw)
    return ExportedFile(str(path), digest.hexdigest(), {**content, "weights": weights}, io.BytesIO(data))


def _declared(about: Mapping[str, Any]) -> Declared:
    shape = tuple(about["shape"])
    if about["dtype"] not in STORAGES:
        raise ValueError(f"it has a tensor of dtype {about['dtype']}")
    return Declared(STORAGES[about["dtype"]], shape, (), "", 0)
