"""What the command lines share: two consoles, a progress bar, and errors as one line.

Results go to stdout; everything else (progress, notes, warnings, errors) goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from policies.api import PolicyError
from policies.registry import UnknownPolicy

__all__ = ["bar", "interrupted", "note", "reporting", "stderr", "stdout", "warn"]

PIPE_COLUMNS = 160
"""Width of tables that nobody sees at once: wide enough for about ten runs."""

USER_ERRORS = (ValueError, OSError, UnknownPolicy, PolicyError)
"""What bad input raises; anything else is a bug and keeps its traceback."""

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Set to 1 to see tracebacks, as for any Hydra application."""


def stdout() -> Console:
    """For results."""
    return Console(
        width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False, emoji=False
    )


def stderr() -> Console:
    """For everything else."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def note(text: str) -> None:
    """A line that a reader of the results should know."""
    stderr().print(f"note: {text}", markup=False)


def warn(text: str) -> None:
    """A line that a reader of the results must know."""
    stderr().print(f"warning: {text}", style="yellow", markup=False)


@contextmanager
def bar(total_runs: int = 1, *, show: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; the function is called with (label, requests done, requests) of a run.

    Nothing is shown where stderr is no terminal.
    """
    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not (show and console.is_terminal)
    ) as progress:
        task = progress.add_task("", total=None)
        labels: list[str] = []

        def update(label: str, done: int, total: int) -> None:
            if label not in labels:
                labels.append(label)
            before = (len(labels) - 1) * total
            progress.update(
                task, description=label, completed=before + done, total=total_runs * total
            )

        yield update


@contextmanager
def reporting(*, full: bool | None = None) -> Iterator[None]:
    """Turns bad input and Ctrl-C into one line and exit code 2."""
    full = os.environ.get(FULL_ERROR) == "1" if full is None else full
    try:
        yield
    except KeyboardInterrupt:
        interrupted()
    except USER_ERRORS as error:
        if full:
            raise
        stderr().print(f"error: {one_line(error)}", style="red", markup=False)
        raise SystemExit(2) from None


def interrupted() -> None:
    """Says so and leaves."""
    stderr().print("interrupted: nothing of the run in progress was saved")
    raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """The message of an error, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def say_all(say: Callable[[str], None], lines: Iterable[str]) -> None:
    """Says each line once."""
    for line in dict.fromkeys(lines):
        say(line)
