"""The device and precision that evaluations used last on this machine: enough to find cached results before torch is loaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.config import DeviceConfig
from ddpmctl.data.cache import any_error_is_damage, cache_folder, mark_used
from ddpmctl.errors import DdpmctlError, UsageError
from ddpmctl.files import write_text

if TYPE_CHECKING:
    from ddpmctl.device import ComputeDevice

PRECISIONS = ("fp32", "bf16")
KINDS = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class RememberedDevice:
    """The device of the last evaluation with these settings. It is used again, so that cached results on a machine have one precision."""

    kind: str
    precision: str
    settings: DeviceConfig

    def load(self) -> ComputeDevice:
        """Return the device; a second call returns the same one.

        Raises:
            UsageError: there is no such device now; the next command chooses anew.
        """
        return _loaded(self)


@functools.lru_cache(maxsize=1)
def _loaded(remembered: RememberedDevice) -> ComputeDevice:
    from ddpmctl.device import make_compute_device

    compute = make_compute_device(replace(remembered.settings, precision=remembered.precision))
    if compute.kind != remembered.kind:
        _file(remembered.settings).unlink(missing_ok=True)
        raise UsageError(f"--device: the last evaluation used {remembered.kind}, which is not available now; run the command again to use {compute.kind}")
    return compute


def remembered_device(settings: DeviceConfig) -> RememberedDevice | None:
    """Return the device of the last evaluation with these settings on this machine, or None if there was none."""
    with any_error_is_damage():
        file = _file(settings)
        kind, precision = json.loads(file.read_text(encoding="utf-8"))
        if kind in KINDS and precision in PRECISIONS:
            mark_used(file)
            return RememberedDevice(kind, precision, settings)
    return None


def remember_device(settings: DeviceConfig, compute: ComputeDevice) -> None:
    """Keep the device that was chosen for these settings; ignore a cache folder that cannot be written."""
    with suppress(OSError, DdpmctlError):
        file = _file(settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps([compute.kind, compute.precision]) + "\n")


def _file(settings: DeviceConfig) -> Path:
    """Return where the device is kept: a file for each machine, version of torch, set of visible GPUs, and pair of settings."""
    machine = [platform.node(), platform.machine(), os.cpu_count(), importlib.metadata.version("torch"), os.environ.get("CUDA_VISIBLE_DEVICES")]
    return cache_folder() / "devices" / f"{hashlib.sha256(json.dumps([machine, settings.device, settings.precision]).encode()).hexdigest()}.json"
