"""Image grids with captions and titles, as PNG and GIF."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddpmctl.errors import visible
from ddpmctl.files import atomic_write

ImageArray = npt.NDArray[np.uint8]

CELL = 128  # pixels of an image's side, at least: smaller ones are enlarged, so that captions fit under them
PAD = 6
FONT_SIZE = 13
LINE = 16
RARE_COLOURS = 96  # of the 256 of a GIF's frame, for small objects
LAST_LATIN = "\u00ff"
INK, PAPER = (30, 30, 30), (255, 255, 255)


class ImageBatch(Protocol):
    """uint8 images (N, 3, H, W) that numpy can convert, such as a CPU tensor."""

    def __array__(self, dtype: None = None, /) -> npt.NDArray[np.uint8]:
        """Return the images."""


def save_grid(path: Path, images: ImageBatch, captions: Sequence[str], *, columns: int = 8) -> Path:
    """Write images, uint8 (N, 3, H, W), as one PNG with a caption, of one or several lines, under each."""
    cells = _images(images)
    columns = min(columns, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    below = [captions[i : i + columns] for i in range(0, len(cells), columns)]
    return save_image(path, draw_sheet(rows, captions=below))


def save_image(path: Path, image: Image.Image) -> Path:
    """Write an image as PNG; return the path."""
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG")
    return path


def draw_sheet(
    rows: Sequence[Sequence[ImageArray]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Return rows of images (H, W, 3) as one image, with captions under images and titles of rows and columns."""
    row_titles = ["\n".join(map(visible, _lines(title))) for title in row_titles or ()]
    font = _font("".join(itertools.chain(row_titles, column_titles or (), *(captions or ()))))
    scale = -(-CELL // max(rows[0][0].shape[:2]))
    height, width = (scale * side for side in rows[0][0].shape[:2])
    text_left = max((int(font.getlength(line)) + 1 for title in row_titles for line in _lines(title)), default=-PAD) + PAD
    text_below = [LINE * max((len(_lines(c)) for c in row), default=0) for row in captions] if captions else [0] * len(rows)
    top = LINE + PAD if column_titles else PAD
    columns = max(map(len, rows))
    size = (text_left + PAD + columns * (width + PAD), top + sum(height + PAD + below for below in text_below))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles or ()):
        draw.text((text_left + PAD + column * (width + PAD) + width // 2, PAD), title, INK, font, anchor="mt")
    y = top
    for index, row in enumerate(rows):
        if row_titles:
            block = "\n".join(_lines(row_titles[index]))
            draw.text((text_left, y + height // 2), block, INK, font, anchor="rm", align="right")
        for column, image in enumerate(row):
            x = text_left + PAD + column * (width + PAD)
            sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
            for number, line in enumerate(_lines(captions[index][column]) if captions else ()):
                draw.text((x + width // 2, y + height + 2 + number * LINE), line, INK, font, anchor="mt")
        y += height + PAD + text_below[index]
    return sheet


def save_gif(path: Path, frames: Sequence[Image.Image]) -> Path:
    """Write frames as an endless GIF, each with a palette of its own, that shows the last frame for two seconds."""
    durations = [120] * (len(frames) - 1) + [2000]
    first, *others = map(_with_palette, frames)
    with atomic_write(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return path


def _with_palette(image: Image.Image) -> Image.Image:
    """Return an image in the 256 colours of a GIF, without dithering, whose dots would look like noise.

    Most colours go to what fills the image, by median cut: alone, it would leave none to small objects and show a red one brown. So the
    others cover the range of colours. Both are refined by k-means on the image before it was enlarged.
    """
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.NEAREST)  # images of 64x64 are drawn twice as large
    colours = [*INK, *PAPER]
    for count, method in ((254 - RARE_COLOURS, Image.Quantize.MEDIANCUT), (RARE_COLOURS, Image.Quantize.MAXCOVERAGE)):
        found = small.quantize(count, method, kmeans=100, dither=Image.Dither.NONE).getpalette() or []
        colours += found[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def save_images(folder: Path, images: ImageBatch, names: Sequence[str]) -> list[Path]:
    """Write each image, uint8 (3, H, W), as a PNG; return the paths."""
    return [save_image(folder / name, Image.fromarray(image)) for image, name in zip(_images(images), names, strict=True)]


def _images(images: ImageBatch) -> list[ImageArray]:
    return list(np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1)))


def _lines(caption: str) -> list[str]:
    return caption.split("\n") if caption else []


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, or for letters that it lacks, such as Cyrillic or Greek ones, the font of matplotlib."""
    if all(letter <= LAST_LATIN for letter in text):
        return ImageFont.load_default(FONT_SIZE)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE - 2)  # as wide as the other
