"""Errors caused by the user's input or environment, each with its exit code."""

import math


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
