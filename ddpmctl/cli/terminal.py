"""Terminal output, the only module that uses rich. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from ddpmctl.cli.layout import lay_out, length
from ddpmctl.errors import visible
from ddpmctl.progress import Notice, Progress

if TYPE_CHECKING:
    from ddpmctl.training.plan import Plan

E = TypeVar("E")
R = TypeVar("R")
DAY = 24 * 3600
PIPE_CLOSED = 141  # 128 + SIGPIPE
ASCII = {ord("─"): "-", ord("…"): "..."}  # for terminals that have no other characters


class Terminal:
    """Consoles for stdout and stderr; progress bars only on a terminal."""

    def __init__(self, *, silent: bool = False) -> None:
        """Create the consoles; ``silent`` is for ranks other than 0."""
        plain: dict[str, Any] = {"highlight": False, "emoji": False, "quiet": silent}
        # Without force_interactive, FORCE_COLOR would enable progress bars in CI logs.
        self.err = _Console(stderr=True, force_interactive=sys.stderr.isatty(), **plain)
        self.out = _Console(**plain)
        self._on_screen = sys.stdout.isatty()
        self._width = self.out.width if self._on_screen else _columns()
        self._printed = False

    def error(self, text: str) -> None:
        """Print an error in one line on stderr."""
        self.err.print(f"[bold red]error:[/] {escape(self.err.shown(text))}", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a note in one line on stderr."""
        self.err.print(f"[yellow]note:[/] {escape(self.err.shown(text))}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a message on stderr."""
        self.err.print(escape(self.err.shown(text)), soft_wrap=True)

    def result(self, text: str) -> None:
        """Print a result in one line on stdout."""
        self._printed = True
        self.out.print(self.out.shown(text), markup=False, soft_wrap=True)

    def document(self, text: str) -> None:
        """Print a text of several lines on stdout, such as JSON."""
        self._printed = True
        self.out.print("\n".join(map(self.out.shown, text.rstrip("\n").split("\n"))), markup=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, groups: Sequence[str] = (), marked: int | None = None, caption: str = ""
    ) -> None:
        """Print a table on stdout, in the form that ``lay_out`` describes; one row may be marked.

        On a terminal it fits the window. Elsewhere it is plain text without box characters, as wide as it needs to be, or at most as wide
        as the environment variable COLUMNS says.
        """
        shown = self.out.shown  # before the widths are measured
        lines = lay_out([*map(shown, columns)], [[*map(shown, row)] for row in rows], [*map(shown, groups)], width=self._width)
        if self._printed:
            self.result("")
        self.sentence(title, "bold")
        for line in lines.head:
            self._line(line, "bold cyan")
        if self._on_screen:
            self._line(shown("─") * max(length(line) for part in (lines.head, *lines.rows) for line in part), "dim")
        for number, (first, *more) in enumerate(lines.rows):
            self._line(first, "bold green" if number == marked else "")
            for line in more:
                self._line(line, "dim")
        if caption:
            self.sentence(caption, "dim")

    def sentence(self, text: str, style: str = "") -> None:
        """Print a sentence on stdout; where the width is limited, lines end between words."""
        text = self.out.shown(text)
        for line in [text] if self._width is None else textwrap.wrap(text, self._width, break_long_words=False, break_on_hyphens=False):
            self._line(line, style)

    def _line(self, text: str, style: str) -> None:
        self._printed = True
        self.out.print(Text(text, style), soft_wrap=True)

    def plan(self, plan: Plan) -> None:
        """Print the training plan on stderr."""
        training = plan.config.training
        budget = f"{training.minutes:g} minutes" if training.minutes is not None else f"{training.epochs} epochs, {plan.steps:,} steps"
        duration = "unknown" if plan.seconds is None else human_seconds(plan.seconds)
        lines = {
            "run": str(plan.run),
            "data": f"{plan.data}: {plan.images:,} images",
            "network": f"{plan.config.model.net}, {plan.config.model.act}, width {plan.config.model.width}: {plan.parameters:,} parameters",
            "schedule": f"{plan.config.diffusion.schedule}, T = {plan.config.diffusion.timesteps}, terminal SNR {plan.terminal_snr:.2g}",
            "device": f"{plan.device}, {plan.precision}",
            "budget": f"{budget} of {training.batch_size} images, {plan.steps_per_epoch} steps an epoch",
            "estimated": f"{duration} of training in all, without sampling for scores",
            "evaluator": plan.evaluator,
            "disk": plan.disk,
        }
        for name, text in lines.items():
            self.err.print(f"[bold]{name:>10}[/]  {escape(self.err.shown(text))}", soft_wrap=True)
        if plan.seconds is not None and plan.seconds > DAY:
            self.warn(f"this takes about {human_seconds(plan.seconds)} here; --preset quick is much shorter")

    def finish(self, task: Generator[Any, None, R], show: Callable[[Any], object] = id) -> R:
        """Run a task that yields events, call ``show`` with each, and return its result."""
        result: list[R] = []

        def events() -> Iterator[Any]:
            result.append((yield from task))

        for event in self.follow(events()):
            show(event)
        return result[0]

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show a text on a terminal while the body runs, such as "loading torch", which takes seconds. The text is removed afterwards."""
        with self.err.status(escape(text)) if self.err.is_interactive else nullcontext():
            yield

    def follow(self, events: Iterator[E]) -> Iterator[E]:
        """Display events and yield them; unknown events are not displayed."""
        yield from (_Live(self.err) if self.err.is_interactive else _Plain(self.err)).follow(events)


class _Console(Console):
    """A console that escapes what it cannot show, and ends the command with the code of SIGPIPE when its reader, such as ``head``, has ended."""

    def shown(self, text: str) -> str:
        """Return a text as it can be shown: without control characters, in the characters that the output's encoding has."""
        text = visible(text)
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            return text.translate(ASCII).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return text

    def on_broken_pipe(self) -> None:
        """Exit with the code of SIGPIPE; nothing more can be written."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(PIPE_CLOSED) from None


class _Remaining(ProgressColumn):
    """The estimated remaining time, in days where it is long."""

    def render(self, task: Task) -> Text:
        """Return it as text, or nothing while it is not known."""
        return Text("" if task.time_remaining is None else human_seconds(task.time_remaining))


class _Plain:
    """Without a terminal: one line per epoch and per long stage."""

    def __init__(self, console: _Console) -> None:
        self.console = console
        self.stage, self.started = "", 0.0

    def follow(self, events: Iterator[Any]) -> Iterator[Any]:
        for event in events:
            line = self._stage(event) if isinstance(event, Progress) else describe(event)
            if line:
                self.console.print(escape(self.console.shown(line)), soft_wrap=True)
            yield event

    def _stage(self, event: Any) -> str:
        if event.done >= event.total:
            stage, self.stage = self.stage, ""
            count = f"{event.total:,} in " if event.total > 1 else ""
            return f"{event.stage}: {count}{time.monotonic() - self.started:.1f} s" if stage else ""
        if event.stage != self.stage:
            self.stage, self.started = event.stage, time.monotonic()
        return ""


class _Live:
    """On a terminal: a progress bar for the run and for the current stage."""

    def __init__(self, console: _Console) -> None:
        self.console = console
        self.bars: dict[str, TaskID] = {}
        self.accuracies = ""

    def follow(self, events: Iterator[Any]) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Remaining(), TextColumn("{task.fields[note]}"))
        with ProgressBars(*columns, console=self.console, transient=True) as progress:
            for event in events:
                self._show(progress, event)
                yield event

    def _show(self, progress: ProgressBars, event: Any) -> None:
        from ddpmctl.training import events  # here, not above: it loads torch, which --help does not need

        match event:
            case Progress():
                self._bar(progress, event.stage, event.done, event.total, "")
            case events.Ticked():
                note = f"epoch {event.epoch}  loss {event.loss:.5f}  {event.images_per_second:.0f} images/s  {self.accuracies}"
                self._bar(progress, "training", event.fraction, 1, note)
            case events.Evaluated():
                self.accuracies = "  ".join(f"{name} {score.accuracy:.3f}" for name, score in event.scores.items())
        if line := describe(event):
            progress.console.print(escape(self.console.shown(line)), soft_wrap=True)

    def _bar(self, progress: ProgressBars, stage: str, done: float, total: float, note: str) -> None:
        if stage not in self.bars:
            self.bars[stage] = progress.add_task(escape(self.console.shown(stage)), note="")
        progress.update(self.bars[stage], completed=done, total=total, note=escape(self.console.shown(note)))
        if done >= total:
            progress.remove_task(self.bars.pop(stage))


def describe(event: object) -> str:  # noqa: PLR0911 - one line per event
    """Return an event as one line of text, empty for events without a message."""
    from ddpmctl.evaluation.results import Failed
    from ddpmctl.training import events

    match event:
        case events.EpochDone():
            return f"epoch {event.epoch}  loss {event.loss:.6f}  {event.images_per_second:.1f} images/s  {human_seconds(event.seconds)}"
        case events.Evaluated():
            parts = [f"{name} {s.accuracy:.4f} ({s.hits}/{s.labels}), exact {s.exact}/{s.images}" for name, s in event.scores.items()]
            return f"epoch {event.epoch}  " + "  ".join([*parts, f"sharpness {event.sharpness:.2f}"])
        case events.Resumed():
            left = "" if event.seconds is None else f"; about {human_seconds(event.seconds)} of training left"
            return f"goes on in epoch {event.epoch}, after step {event.step:,}: {100 * event.fraction:.0f} % of the budget is used{left}"
        case events.RolledBack():
            return f"note: {event.reason}; back to step {event.step} at {event.lr_scale:g} of the learning rate (rollback {event.count})"
        case events.Overridden():
            return "note: from here on " + "; ".join(f"{name} is {now}, not {before}" for name, (before, now) in event.changed.items())
        case Failed():
            return f"skipped {event.path}: {event.reason}"
        case Notice():
            return f"note: {event.text}"
        case _:
            return ""


def _columns() -> int | None:
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def human_seconds(seconds: float) -> str:
    """Return a duration as text."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 2 * DAY:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / DAY:.1f} days"
