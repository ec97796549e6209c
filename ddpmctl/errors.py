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


def json_kind(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
