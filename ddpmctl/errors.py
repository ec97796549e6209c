"""Errors caused by the user's input or environment, each with its exit code."""

from __future__ import annotations

import errno
import math

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc", "failed to map segment")


class DdpmctlError(Exception):
    """Base class; the message is one line: where, what is wrong, and what to do."""

    exit_code = 1


class UsageError(DdpmctlError):
    """A flag, setting or name that cannot be used as given."""

    exit_code = 2


class DataError(DdpmctlError):
    """A file or folder whose contents cannot be used: images, JSON files, checkpoints."""

    exit_code = 3


class DivergedError(DdpmctlError):
    """Training diverged: the loss or the weights are not finite."""

    exit_code = 4


class PeerError(DdpmctlError):
    """Another process of the job failed or cannot be reached."""

    exit_code = 5


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted: of the GPU, of the machine, or within a limit (ulimit -v)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    text = str(error).strip().lower()
    # Of torch and of the libraries below it, also where ctypes cannot load one (an OSError without a number); the last one is all that oneDNN says.
    return isinstance(error, (RuntimeError, ImportError, OSError)) and (any(part in text for part in NO_MEMORY) or text == "could not create a primitive")


def limit_reached(error: BaseException) -> UsageError | None:
    """Return the error to show where a limit of the machine is reached: memory, open files, threads, the length of a name; else None."""
    if out_of_memory(error):
        return UsageError("there is too little memory; close other programs or, where it is limited (ulimit -v), raise the limit")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return UsageError("too many files are open for this process; raise the limit (ulimit -n)")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{str(error.filename)[:80]}...: {error.strerror}; give a shorter name")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return UsageError("no further thread can be started; raise the limit of processes (ulimit -u) or of memory (ulimit -v)")
    return None


LONGEST = 300  # bits of a whole number that is shown with its digits; Python refuses to write one of over 4,300 digits


def show(value: object) -> str:
    """Return a value for a one-line message: escaped, and shortened if long."""
    if isinstance(value, int) and value.bit_length() > LONGEST:
        return f"a number of about {round(value.bit_length() * math.log10(2)):,} digits"
    text = json_kind(value) if isinstance(value, (dict, list, type(None))) else repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:90]}..."


def visible(text: str) -> str:
    """Return a text in one line that cannot act on a terminal or a page, such as the name of a file from an unknown source.

    What is not printable is escaped: control characters and line breaks as ``\\x1b`` and ``\\n``, marks that turn the direction of writing as ``\\u202e``,
    and bytes of a name that are not UTF-8 as ``\\xe9``. Every text that names files passes through here on its way to the terminal, a page, a figure, LaTeX or
    CSV; JSON keeps exact names.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # how Python keeps a byte of a file name that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode("ascii")


def json_kind(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
