"""The errors that a person can cause, each with the exit code that the command line gives it."""


class DdpmctlError(Exception):
    """A problem to be told in one line: what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(DdpmctlError):
    """A flag, setting or name that cannot be used as given."""

    exit_code = 2


class DataError(DdpmctlError):
    """A file or folder whose contents cannot be used: images, JSON files, checkpoints."""

    exit_code = 3


class DivergedError(DdpmctlError):
    """Training whose numbers are no longer finite."""

    exit_code = 4


class PeerError(DdpmctlError):
    """Another process of the job failed, or cannot be reached any more."""

    exit_code = 5


def show(value: object) -> str:
    """Return a value as it may stand in a one-line message: escaped, and cut when long."""
    text = repr(value[:80]) if isinstance(value, str) else repr(value) if isinstance(value, (int, float)) else json_kind(value)
    return text if len(text) <= 100 else f"{text[:90]}..."


def json_kind(value: object) -> str:
    """Return what JSON calls a value's type, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
