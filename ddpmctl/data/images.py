"""Image files: finding them inside a data folder, and decoding them to square RGB."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpmctl.data.archives import ZipMember
from ddpmctl.data.folders import Problem
from ddpmctl.data.source import FITS
from ddpmctl.errors import DataError, limit_reached, show
from ddpmctl.files import in_bytes
from ddpmctl.iclevr import ICLEVR

PLACES = ("iclevr", "images", ".")  # the usual one first: if it has all images, the others are not searched
FORMATS = ("PNG", "JPEG")
PNG_END = b"IEND\xaeB`\x82"
TRAILER = 65536  # bytes that may follow the end of a PNG
CHUNK = 256  # images between two progress events
MOST_BYTES = 500_000_000  # for the pixels that all threads decode at the same time; docs/data.md states both limits
MOST_FILE_BYTES = 60_000_000  # each thread may keep as many of a file, such as its metadata
STRIP = 2**20  # pixels of a 16-bit image that are scaled at once
RGB_BYTES = 4  # of a pixel; Pillow keeps all modes with more than one channel like this
COEFFICIENT_BYTES = 2  # of a progressive JPEG, which is kept whole before it becomes pixels
GRAY = ("1", "L")
# malloc returns only blocks of more than 32 MiB at once to the system; of smaller ones, each thread keeps what it has freed.
getattr(Image.core, "set_block_size", int)(2**26)  # type: ignore[attr-defined]  # not documented, so it may be missing
T = TypeVar("T")
_opening = threading.Lock()


class _Memory:
    """Bytes that threads share; a thread waits until there are enough of them."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.returned = threading.Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        with self.returned:
            self.returned.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.returned:
                self.free += size
                self.returned.notify_all()


_memory = _Memory(MOST_BYTES)


ImageFile: TypeAlias = Path | ZipMember


@dataclass(frozen=True)
class FoundImage:
    """One declared image: its name, the folder that the name is relative to, its size in bytes and its modification time."""

    name: str
    place: Path
    size: int
    mtime_ns: int

    @property
    def path(self) -> ImageFile:
        """Where it is (computed on demand: a cached start does not need the 18,009 paths)."""
        return self.place / self.name


@dataclass(frozen=True)
class FoundMember(FoundImage):
    """One declared image in the zip file ``place``; ``mtime_ns`` is its checksum."""

    @property
    def path(self) -> ImageFile:
        """Where it is."""
        return ZipMember(self.place, self.name)


def find_images(folder: Path, names: Sequence[str]) -> tuple[list[FoundImage], list[Problem]]:
    """Return the declared images that exist, and a problem for each that is missing or must not be opened.

    The images all lie in one place: the folder itself, ``iclevr/`` or ``images/``, whichever holds most of them. That place may be
    a link to another disk, but no file in it may be a link that leads out of it.
    """
    best: tuple[list[FoundImage], list[Problem]] | None = None
    for place in (folder / place for place in PLACES):
        if not os.path.isdir(place):
            continue
        found, problems = find_in(place, folder, names)
        if best is None or len(found) > len(best[0]):
            best = found, problems
        if not problems:
            break
    return best or ([], [Problem(str(folder), "cannot be read")])


def decode_image(path: ImageFile, *, size: int = ICLEVR.size, fit: str = FITS[0], resize: bool = True) -> np.ndarray:
    """Return an image file as uint8 RGB, (3, size, size); without ``resize``, an image of another size is refused.

    The lab's own steps: ``convert("RGB")``, then Pillow's antialiased bilinear resize. Images that are not square are squeezed, cropped or
    padded; see ``fitted``. So transparency, colour profiles and the orientation in EXIF
    have no effect, and of an animated PNG the first image is taken. 16-bit gray is scaled to 8 bits, where Pillow would clip it.

    Raises:
        DataError: missing, neither PNG nor JPEG, damaged, cut short, larger than ``MOST_BYTES`` or ``MOST_FILE_BYTES`` allow, or of another size.
    """
    try:
        with _room_for(path) as image:
            if not resize and image.size != (size, size):
                raise DataError(f"is {image.width}x{image.height} pixels; images to score must be {size}x{size}")
            small = fitted(_reduced(image), size, fit)
        pixels = np.asarray(small.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ... on bad bytes
        raise limit_reached(error) or DataError(f"{path}: {_reason(error)}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def fitted(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Return an image of size x size: squeezed; or the largest square in its middle; or whole, padded with the mean colour of its border."""
    width, height = image.size
    if fit == "crop" and width != height:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if fit == "pad" and width != height:
        longest = max(width, height)
        small = image.resize((max(1, round(size * width / longest)), max(1, round(size * height / longest))), Image.Resampling.BILINEAR).convert("RGB")
        pixels = np.asarray(small).astype(np.float64)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        canvas = Image.new("RGB", (size, size), tuple(border.mean(0).round().astype(int).tolist()))
        canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
        return canvas
    return image.resize((size, size), Image.Resampling.BILINEAR)


def check_image(path: ImageFile) -> None:
    """Decode an image fully, and compare the PNG checksums, which decoding alone does not.

    Raises:
        DataError: as ``decode_image``.
    """
    try:
        with _open(path) as image:
            image.verify()
    except Exception as error:
        raise limit_reached(error) or DataError(f"{path}: {_reason(error)}") from error
    decode_image(path)


def each_image(paths: Iterable[ImageFile], work: Callable[[ImageFile], T]) -> Generator[T | DataError, None, None]:
    """Yield ``work(path)``, or the DataError that it raised, for each path in order; in threads, since Pillow releases the GIL."""

    def tried(path: ImageFile) -> T | DataError:
        try:
            return work(path)
        except DataError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(remaining, CHUNK)):
            yield from pool.map(tried, chunk)


def find_in(place: Path, folder: Path, names: Sequence[str]) -> tuple[list[FoundImage], list[Problem]]:
    """Return the named files that exist in a place, and a problem for each that is missing or must not be opened."""
    inside = (Path(os.path.realpath(place)), Path(os.path.realpath(folder)))
    parents: dict[str, bool] = {"": True}  # sub-folder -> whether it is inside; checked once per folder, not per image
    found, problems = [], []
    prefix = os.path.join(place, "")
    for name in names:
        path = prefix + name  # strings: creating 18,009 Path objects takes longer than the rest of a cached start
        parent = name.rpartition("/")[0]
        if parent not in parents:
            parents[parent] = _within(place / parent, inside)
        try:
            about = os.lstat(path)
            stays = parents[parent]
            if stat.S_ISLNK(about.st_mode):
                stays = stays and _within(path, inside)
                about = os.stat(path)
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            problems.append(Problem(os.fspath(place / name), "missing" if missing else f"cannot be read ({error.strerror or error})"))
            continue
        if not stays:
            problems.append(Problem(os.fspath(place / name), "is a link that leads out of the data folder; put the file itself there"))
        elif not stat.S_ISREG(about.st_mode):
            problems.append(Problem(os.fspath(place / name), "is not a regular file"))
        else:
            found.append(FoundImage(name, place, about.st_size, about.st_mtime_ns))
    return found, problems


def _within(path: str | Path, roots: tuple[Path, ...]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in roots)


def _open(path: ImageFile) -> Image.Image:
    if isinstance(path, Path) and (size := os.stat(path).st_size) > MOST_FILE_BYTES:
        raise DataError(f"has {in_bytes(size)}; an image file may have at most {in_bytes(MOST_FILE_BYTES)}; make it smaller")
    file = path if isinstance(path, Path) else io.BytesIO(path.read(MOST_FILE_BYTES))
    # Pillow only warns of an image between one and two times its limit. The warnings filter is global to the process, hence the lock.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
    if image.format == "PNG" and image.fp is not None:  # Pillow decodes a PNG without its last bytes; of a JPEG it reads all
        place = image.fp.tell()
        image.fp.seek(max(0, image.fp.seek(0, os.SEEK_END) - TRAILER))
        end = image.fp.read()
        image.fp.seek(place)
        if PNG_END not in end:
            image.close()
            raise OSError("truncated: the last bytes are missing")
    return image


@contextmanager
def _room_for(path: ImageFile) -> Iterator[Image.Image]:
    """Open an image; in the body there is memory to decode it, which no other thread uses."""
    with _open(path) as image, _memory.held(_bytes_of(image)):
        try:
            yield image
        finally:
            image.close()  # frees the pixels, before another thread gets the memory


def _bytes_of(image: Image.Image) -> int:
    """Return the bytes that it takes to decode an image that is open: its pixels, times the channels and their depth in all copies.

    Raises:
        DataError: they are more than ``MOST_BYTES``.
    """
    if image.mode == "RGB":
        pixel = RGB_BYTES
    elif image.mode in GRAY:
        pixel = 2
    elif _is_wide(image):
        pixel = 3 if image.mode.startswith("I;16") else RGB_BYTES + 1
    else:
        pixel = 2 * RGB_BYTES
    if image.info.get("progressive"):
        pixel += COEFFICIENT_BYTES * len(image.getbands())
    size = image.width * image.height * pixel
    if size > MOST_BYTES:
        shape = f"{image.width}x{image.height} pixels"
        raise DataError(f"is {shape} and takes {in_bytes(size)} to decode; at most {in_bytes(MOST_BYTES)} are used for that; make it smaller")
    return size


def _is_wide(image: Image.Image) -> bool:
    """Return whether it is gray with 16 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _reduced(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit RGB, or as 8-bit gray, which is resized as its three equal channels would be."""
    image.load()
    image.info.pop("transparency", None)  # convert("RGB") drops it in any case, and would warn
    if _is_wide(image):
        return _scaled(image)
    if image.mode in GRAY:
        return image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Return a 16-bit gray image in 8 bits; in strips, so that the numbers between take little memory."""
    gray = Image.new("L", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        wide = np.clip(np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.int64), 0, 65535)
        gray.paste(Image.fromarray(((wide + 128) // 257).astype(np.uint8)), (0, top))
    return gray


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, UnidentifiedImageError):
        return "is neither a PNG nor a JPEG image; convert it to PNG"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels; it is not a training image"
    return f"cannot be decoded ({show(str(error))[1:-1] or type(error).__name__})"
