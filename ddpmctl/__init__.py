"""Train, sample, judge and compare small conditional diffusion models.

``load`` returns a trained model, ``train`` trains one, ``evaluate`` and ``compare`` judge them; each does what the command of its name does.
Their modules are imported when they are used, so that ``import ddpmctl`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from ddpmctl.errors import DataError as DataError
    from ddpmctl.errors import DdpmctlError as DdpmctlError
    from ddpmctl.errors import UsageError as UsageError
    from ddpmctl.interface.judging import Comparison as Comparison
    from ddpmctl.interface.judging import Evaluation as Evaluation
    from ddpmctl.interface.judging import compare as compare
    from ddpmctl.interface.judging import evaluate as evaluate
    from ddpmctl.interface.model import DenoisingFrame as DenoisingFrame
    from ddpmctl.interface.model import ImageScores as ImageScores
    from ddpmctl.interface.model import Model as Model
    from ddpmctl.interface.model import load as load
    from ddpmctl.interface.training import Training as Training
    from ddpmctl.interface.training import train as train

__all__ = [
    "Comparison", "DataError", "DdpmctlError", "DenoisingFrame", "Evaluation", "ImageScores", "Model", "Training", "UsageError", "__version__",
    "compare", "evaluate", "load", "train",
]  # fmt: skip
_MODULES = {
    **dict.fromkeys(("DdpmctlError", "UsageError", "DataError"), "errors"),
    **dict.fromkeys(("load", "Model", "DenoisingFrame", "ImageScores"), "interface.model"),
    **dict.fromkeys(("evaluate", "compare", "Evaluation", "Comparison"), "interface.judging"),
    **dict.fromkeys(("train", "Training"), "interface.training"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ddpmctl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddpmctl.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
