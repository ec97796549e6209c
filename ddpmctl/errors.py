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
