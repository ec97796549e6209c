"""Presets: named settings to start from.

Where each choice was measured: docs/experiments.md.
"""

from __future__ import annotations

from ddpmctl.config import Value

# What quick and best share.
MODERN: dict[str, Value] = {
    "net": "fine-unet",
    "act": "silu",
    "schedule": "cosine",
    "timesteps": 16_000,  # the last steps of a sampler then reach below the grain and the rounding of the images
    "objective": "x0",
    "loss_weight": "snr+1",
    "weight_limit": 40.0,
    "detail_weight": 3.0,  # edges and faces
    "epochs": None,
    "optimizer": "muon",
    "lr_decay": "linear",
    "time_sampling": "logit-normal-low",  # so that the expert for low noise sees all of its levels
    "time_mean": 0.5,
    "time_mean_end": -1.6,
    "time_std": 1.2,
    "label_loss": 0.03,
    "error_loss": 0.0003,  # the grain; at 0.003, objects suffer
    "label_dropout": 0.1,
    "sampler": "dpm++2m",
    "spacing": "karras",
    "steps": 28,
    "guidance": 1.0,
    "guidance_from": 0.1,  # below, guidance makes edges jagged
    "guidance_to": 0.5,  # above, it makes objects larger
    "particles": 16,
    "accept": 0.4,
    "retry_from": 0.7,
}

PRESETS: dict[str, dict[str, Value]] = {
    # The defaults above are the report's recipe; naming it changes nothing.
    "report": {},
    "quick": {**MODERN, "width": 32, "minutes": 5.0, "batch_size": 32, "lr": 0.01, "warmup": 100, "ema": 0.99},
    "best": {**MODERN, "width": 192, "minutes": 10.0, "batch_size": 256, "lr": 0.02, "warmup": 200, "ema": 0.999, "save_every": 50, "compile": "cuda-graph"},
}

# More channels learn more from an image, but take longer for it. In 5 minutes of two CPU cores, images of width 32 are at least as good as those of 64;
# for 30 minutes, 64 was chosen before, and the two were not compared (docs/experiments.md).
LONG_FROM = 10.0  # minutes
LONG: dict[str, dict[str, Value]] = {"quick": {"width": 64}}


def preset_settings(name: str, minutes: float | None) -> dict[str, Value]:
    """Return the settings of a preset, of which some depend on the budget in ``minutes``; None: the budget is in epochs."""
    return PRESETS[name] | (LONG.get(name, {}) if minutes is None or minutes >= LONG_FROM else {})


PRESET_HELP = {
    "report": "exactly the lab report's recipe: 600 epochs of a 7.6 M-parameter network; a GPU or many days",
    "quick": "a small network (0.5 M, from 10 minutes on 2.0 M) and a modern recipe for a laptop CPU: minutes",
    "best": "the same at nine times the size (17 M) for minutes on one GPU",
}
