"""What ``train`` writes for people to look at, beside the run's own records: curves.png, and TensorBoard's files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ddpmctl.cli.crash import in_one_line
from ddpmctl.cli.terminal import Terminal

if TYPE_CHECKING:
    from ddpmctl.runs.folder import Run
    from ddpmctl.training.events import Event


class Monitor:
    """Reads the events of a run. What cannot be written is said once, and never stops training."""

    def __init__(self, terminal: Terminal, run: Run, *, tensorboard: bool) -> None:
        """Draw curves into the run's folder, and write event files where they are asked for."""
        self._terminal, self._run = terminal, run
        self._failed: set[str] = set()
        self._board = None
        if tensorboard:
            from ddpmctl.training.tensorboard import TensorBoard

            self._board = TensorBoard(run)

    def read(self, event: Event) -> None:
        """Draw the curves at each score, and pass every event on."""
        from ddpmctl.training.events import Evaluated

        if isinstance(event, Evaluated):
            self._try("curves.png", self._draw)
        if self._board is not None:
            self._try("tensorboard", functools.partial(self._board.read, event))

    def close(self) -> None:
        """Close the event file."""
        if self._board is not None:
            self._try("tensorboard", self._board.close)

    def _draw(self) -> None:
        from ddpmctl.report.run_figures import save_curves
        from ddpmctl.runs.record import read_record

        save_curves(self._run.curves_file, read_record(self._run.folder))

    def _try(self, name: str, write: Callable[[], object]) -> None:
        if name in self._failed:
            return
        try:
            write()
        except Exception as error:
            self._failed.add(name)
            self._terminal.warn(f"{self._run.folder / name} is not written from here on ({in_one_line(error)}); training goes on")
