"""What the command line shows in a terminal: progress of a job, and facts as aligned rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pocketune.progress import Progress as Event
from pocketune.units import readable_size

_PLAIN_INTERVAL_S = 10.0
_MAX_MEASURED = 8  # a longer mapping of numbers, such as the norm of every tensor, is for --json
_MAX_CHARACTERS = 300


class ProgressDisplay:
    """Shows the events of a job: a bar for each phase in a terminal, now and then a line elsewhere, nothing when quiet.

    Use it as a context manager, and give it to a job as its `on_progress`.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        """Show on `console`, which should write to stderr."""
        self._console = console
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", justify="right"),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[memory]}", justify="right"),
            TextColumn("{task.fields[loss]}", justify="right"),
            console=console,
            disable=quiet or not console.is_terminal,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._phase: str | None = None
        self._spoken_s = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish_phase()
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if self._quiet:
            return
        if event.note:
            self._console.print(Text(printable(event.note)), soft_wrap=True)
            return
        count = count_of(event) if event.total else ""
        loss = "" if event.loss is None else f"loss {event.loss:.4f}"
        memory = readable_size(event.rss_bytes)
        if not self._console.is_terminal:
            self._speak(event, " ".join(part for part in (f"{event.phase}:", count, loss, f"({memory})") if part))
            return
        if event.phase != self._phase:
            self._finish_phase()
            self._phase = event.phase
            if event.phase not in self._tasks:
                self._tasks[event.phase] = self._bars.add_task(event.phase, total=None, count="", memory="", loss="")
        self._bars.update(
            self._tasks[event.phase], completed=event.done, total=event.total or None, count=count, memory=memory, loss=loss
        )

    def _finish_phase(self) -> None:
        if self._phase is None or self._phase not in self._tasks:
            return
        task = self._tasks[self._phase]
        if self._bars.tasks[task].total is None:
            self._bars.update(task, completed=1, total=1)
        self._bars.stop_task(task)

    def _speak(self, event: Event, line: str) -> None:
        """Print a line when a phase begins or ends, and every few seconds between."""
        now = time.monotonic()
        begins, ends = event.phase != self._phase, 0 < event.total == event.done
        if begins or ends or now - self._spoken_s >= _PLAIN_INTERVAL_S:
            self._console.print(Text(line), soft_wrap=True)
            self._spoken_s = now
        self._phase = event.phase


class _Rate(ProgressColumn):
    """How many units a second, or how many seconds a unit where that reads better."""

    def render(self, task: Task) -> Text:
        """Give the text of a bar."""
        speed = task.finished_speed or task.speed
        if not speed or not task.total or task.total == 1:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


def count_of(event: Event) -> str:
    """How far a phase is: 3/10 steps."""
    return f"{event.done}/{event.total} {event.unit}{'' if event.total == 1 else 's'}"


def printable(text: str) -> str:
    """One line without control characters, so that a name from a file cannot steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    """Print names and values as two columns; values within values are indented."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, max_width=36)
    table.add_column(overflow="fold")
    for name, value in _rows(facts, indent=""):
        table.add_row(Text(name), Text(value))
    console.print(table)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print sentences as a list."""
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row(Text("•"), Text(printable(line)))
    console.print(table)


def _rows(facts: Mapping[str, Any], *, indent: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{indent}{printable(key).removesuffix('_bytes').replace('_', ' ')}"
        if isinstance(value, Mapping) and len(value) > _MAX_MEASURED and all(isinstance(v, float) for v in value.values()):
            yield name, f"{len(value)} numbers"
        elif isinstance(value, Mapping) and value:
            yield name, ""
            yield from _rows(value, indent=indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield f"{name} {number}", ""
                yield from _rows(item, indent=indent + "  ")
        else:
            yield name, _text(key, value)


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int | float):
        return readable_size(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return ", ".join(printable(str(item)) for item in value) or "none"
    text = printable(str(value))
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
