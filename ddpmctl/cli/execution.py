"""Execution of a command: it joins its job, and every error becomes one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable

import typer

from ddpmctl.cli.crash import in_one_line, report
from ddpmctl.cli.signals import Stopped, stop_is_raised
from ddpmctl.cli.terminal import Terminal
from ddpmctl.distributed.job import SINGLE, Job, is_single_process, join
from ddpmctl.errors import DdpmctlError, limit_reached
from ddpmctl.files import remove_empty_folders


def execute(work: Callable[[Job], None]) -> None:
    """Do the work of a command, as a part of its job.

    Raises:
        typer.Exit: it did not succeed; why was printed, by the first process that failed.
    """
    job = SINGLE
    try:
        with stop_is_raised():
            job = join()
            _watch(job)
            job.require_one_version()
            try:
                work(job)
            finally:
                remove_empty_folders()
    except DdpmctlError as error:
        raise _ended(job, error) from None
    except Stopped as stop:
        # Not where torchrun ends those who are left after another one failed, nor before it is known which of them this is.
        if job.is_leader and job.is_single == is_single_process() and job.claim(stop.words):
            Terminal().say(stop.words)
        raise typer.Exit(stop.exit_code) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):  # the last one: whoever read our output went away
        raise
    except Exception as error:
        raise _ended(job, limit_reached(error) or _unexpected(error)) from None


def _ended(job: Job, error: DdpmctlError) -> typer.Exit:
    """Print an error, unless another process of the job failed first; return the end of the command."""
    text = str(error)
    if job.claim(text):
        Terminal().error(text if job.is_single else f"{job}: {text}")
    return typer.Exit(error.exit_code)


def _unexpected(error: Exception) -> DdpmctlError:
    """Write the traceback to a file and return an error that names it."""
    file = report(error)
    where = f"the full traceback is in {file}" if file else "and the traceback could not be written anywhere"
    return DdpmctlError(f"unexpected: {in_one_line(error)}; {where}. Please report it")


def _watch(job: Job) -> None:
    """Start to watch the other processes of the job, and print messages about those that do not answer."""
    if job.watch is None:
        return
    terminal = Terminal()

    def ended(show: Callable[[str], None], text: str) -> None:
        terminal.err.show_cursor()  # a progress bar may have hidden it
        show(text)

    def failed(text: str) -> None:
        ended(terminal.error, f"{job}: {text}")

    def stopped(number: int, text: str) -> None:
        ended(terminal.say, f"{Stopped(number).words}; {text}")

    job.watch.start(job.claim, terminal.warn, failed, stopped)
