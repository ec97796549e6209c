"""denoise-grid: rows, columns, confidence and the GIF, through the real command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.grids import draw_sheet, save_gif

from .conftest import ddpmctl, size
from .test_cli_commands import checkpoint_of, pixels

CELL = 128 + 6  # an enlarged image and the space after it


def columns_of(sheet: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the images in the last row of a sheet without captions, at their own size."""
    left = sheet.shape[1] - count * CELL
    return [sheet[-CELL:-6, left + at * CELL : left + (at + 1) * CELL - 6][::2, ::2] for at in range(count)]


@pytest.fixture(scope="module")
def many_steps(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A command with a checkpoint of 400 diffusion steps, sampled in 40."""
    file = tmp_path_factory.mktemp("foreign") / "foreign.pth"
    torch.save(load_checkpoint(checkpoint_of(run)).weights, file)
    return ("denoise-grid", file, "--assume", "timesteps=400", "--sampler", "ddim", "--steps", 40, "--precision", "fp32")


def test_rows_columns_x0_and_gif(run: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, options in {"one": (), "two": ("--labels", "gray cylinder"), "x0": ("--x0",), "few": ("--columns", 2)}.items():
        common = ("--labels", "red cube,blue sphere", "--no-confidence", "--gif", tmp_path / "a.gif")
        result = ddpmctl("denoise-grid", run, *common, "-o", tmp_path / f"{name}.png", *options)
        assert result.exit_code == 0, result.output
        sizes[name] = size(tmp_path / f"{name}.png")
    assert sizes["two"][1] == sizes["x0"][1] == sizes["one"][1] + CELL
    assert sizes["one"][0] == sizes["few"][0] + 2 * CELL  # 4 frames of 3 steps, and 2
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4


def test_without_labels_it_shows_the_set_of_the_course_in_at_least_8_frames(many_steps: tuple[object, ...], tmp_path: Path) -> None:
    assert ddpmctl(*many_steps, "-o", tmp_path / "course.png").exit_code == 0
    assert ddpmctl(*many_steps, "--labels", "red sphere,cyan cylinder,cyan cube", "-o", tmp_path / "named.png").exit_code == 0
    assert (tmp_path / "course.png").read_bytes() == (tmp_path / "named.png").read_bytes()
    assert size(tmp_path / "course.png")[0] >= 8 * CELL


def test_frames_are_spread_over_what_can_be_seen(many_steps: tuple[object, ...], tmp_path: Path) -> None:
    """No large step in log SNR between -3 and 7, where images appear; frames that are even in t make one of 3.9."""
    assert ddpmctl(*many_steps, "--columns", 10, "-o", tmp_path / "ten.png").exit_code == 0
    assert ddpmctl(*many_steps, "--columns", 41, "-o", tmp_path / "all.png").exit_code == 0
    every = columns_of(pixels(tmp_path / "all.png"), 41)
    shown = [next(at for at, image in enumerate(every) if np.array_equal(image, column)) for column in columns_of(pixels(tmp_path / "ten.png"), 10)]
    assert (shown[0], shown[-1]) == (0, 40)
    assert shown == sorted(set(shown))
    log_snr = make_schedule(Config().replace(timesteps=400).diffusion).log_snr
    assert np.diff(np.clip([log_snr[400 - 10 * at] for at in shown], -3, 7)).max() < 1.6


def test_it_starts_from_noise_and_ends_with_the_image_of_sample(run: Path, tmp_path: Path) -> None:
    common = ("--labels", "red cube", "--precision", "fp32")
    assert ddpmctl("denoise-grid", run, *common, "--columns", 2, "-o", tmp_path / "g.png").exit_code == 0
    assert ddpmctl("sample", run, *common, "-o", tmp_path / "out").exit_code == 0
    first, last = columns_of(pixels(tmp_path / "g.png"), 2)
    assert np.array_equal(last, pixels(tmp_path / "out" / "000-red-cube-seed0-000.png"))
    assert 60 < first.std() < 110  # unit normal noise on the scale of 127.5, clipped


def test_confidence_is_written_under_every_x0_hat_and_nowhere_else(run: Path, tmp_path: Path) -> None:
    """One line of text per label, blank only for pure noise."""
    for name, options in {"with": ("--x0",), "without": ("--x0", "--no-confidence"), "plain": (), "none": ("--no-confidence",)}.items():
        labels = ("--labels", "red cube,blue sphere", "--labels", "gray cylinder")
        assert ddpmctl("denoise-grid", run, *labels, "--columns", 3, "-o", tmp_path / f"{name}.png", *options).exit_code == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "none.png").read_bytes()
    assert size(tmp_path / "with.png")[1] - size(tmp_path / "without.png")[1] == 16 * (2 + 1)
    text = pixels(tmp_path / "with.png")[-16:, -3 * CELL :].min(axis=(0, 2))  # the last row's captions
    first, middle, last = (text[start : start + CELL] < 128 for start in (0, CELL, 2 * CELL))
    assert not first.any()
    assert middle.any()
    assert last.any()


def test_checkpoints_side_by_side_start_from_the_same_noise(run: Path, tmp_path: Path) -> None:
    both = f"{checkpoint_of(run, 1)},{checkpoint_of(run)}"
    result = ddpmctl("denoise-grid", "--checkpoints", both, "--labels", "red cube", "--columns", 2, "-o", tmp_path / "g.png")
    assert result.exit_code == 0, result.output
    sheet = pixels(tmp_path / "g.png")
    upper, lower = columns_of(sheet[:-CELL], 2), columns_of(sheet, 2)
    assert np.array_equal(upper[0], lower[0])
    assert not np.array_equal(upper[1], lower[1])
    for arguments, reason in (((run, "--checkpoints", both), "cannot be combined"), (("--checkpoints", both, "--gif", tmp_path / "a.gif"), "--gif")):
        refused = ddpmctl("denoise-grid", *arguments, "--labels", "red cube", "-o", tmp_path / "no.png")
        assert refused.exit_code == 2
        assert reason in refused.stderr


def test_the_gif_writes_t_and_holds_its_end(run: Path, tmp_path: Path) -> None:
    common = ("--labels", "red cube", "--precision", "fp32", "-o", tmp_path / "g.png", "--columns", 4)
    assert ddpmctl("denoise-grid", run, *common, "--gif", tmp_path / "a.gif").exit_code == 0
    frames, durations = [], []
    with Image.open(tmp_path / "a.gif") as gif:
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(np.array(gif.convert("RGB")).astype(int))
            durations.append(gif.info["duration"])
    assert durations == [120, 120, 120, 2000]
    sheet = pixels(tmp_path / "g.png")
    for frame, column in zip(frames, range(4), strict=True):
        left = sheet.shape[1] - (4 - column) * CELL - 6
        assert np.abs(frame[:22] - sheet[:22, left : left + CELL + 6]).max() < 40, "not the t of this frame"
        assert np.abs(frame[22:150] - sheet[22:150, left : left + CELL + 6]).mean() < 16


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth grey image with four small shaded objects, and where they are."""
    y, x = np.mgrid[0:64, 0:64, 0:1][:2] / 63
    image = 100 + 50 * y * (1 - (x - 0.5) ** 2 / 2) + np.array([2, 0, -3]) * x + np.random.default_rng(seed).normal(0, 1.5, (64, 64, 3))
    objects = np.zeros((64, 64), bool)
    shade = (np.linspace(1, 0.6, 7)[:, None] * np.linspace(1, 0.85, 6))[..., None]
    for (top, left), colour in {(20, 8): (170, 50, 45), (20, 30): (45, 140, 145), (40, 15): (115, 60, 140), (40, 45): (60, 80, 170)}.items():
        image[top : top + 7, left : left + 6] = np.array(colour) * shade
        objects[top : top + 7, left : left + 6] = True
    return image.astype(np.uint8), objects


def test_a_gif_keeps_the_colours_of_small_objects_and_a_smooth_background(tmp_path: Path) -> None:
    """Median cut alone is off by 28 beside noise and by 12 without it; a palette that covers all colours leaves few for the background."""
    (image, objects), (other, _) = scene(0), scene(1)
    noise = np.random.default_rng(0).normal(127, 128, image.shape).clip(0, 255).astype(np.uint8)
    save_gif(tmp_path / "a.gif", [draw_sheet([row, [image, other]]) for row in ([noise, noise], [image, other])])
    with Image.open(tmp_path / "a.gif") as gif:
        for number, limit in enumerate((20, 5)):
            gif.seek(number)
            shown = np.array(gif.convert("RGB")).astype(int)[-CELL:-6, 6:CELL][::2, ::2]
            errors = np.abs(shown - image).max(2)
            assert errors[objects].mean() < limit
            assert errors[~objects].mean() < 4
