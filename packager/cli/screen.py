"""Tables and paragraphs as wide as the terminal, in colour where it is one and NO_COLOR is not set."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NARROW = 80
"""Columns where stdout is no terminal."""
_WIDE = 140
"""No wider than this: eyes lose the line."""


class Screen:
    """What stdout is, asked once."""

    def __init__(self) -> None:
        console = Console()
        width = min(console.width, _WIDE) if console.is_terminal else NARROW
        self._console = Console(width=width, highlight=False)

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[int] = (),
        marked: int | None = None,
        widest: int = 0,
    ) -> str:
        """Aligned columns; `widest` takes what is left and is wrapped. Columns `right` are set to the right; `marked`
        holds rich's markup."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, name in enumerate(header):
            table.add_column(
                name,
                justify="right" if number in right else "left",
                ratio=1 if number == widest else None,
                overflow="fold",
                no_wrap=number in right or number == marked,
                header_style="dim",
            )
        for row in rows:
            table.add_row(*(Text.from_markup(cell) if n == marked else Text(cell) for n, cell in enumerate(row)))
        return self._text(table)

    def wrapped(self, text: str) -> str:
        """A paragraph whose later lines stand in a little."""
        first, *more = Text(text).wrap(self._console, self._console.width - 2)
        return self._text(first) + "".join("\n" + self._text(Padding(line, (0, 0, 0, 2))) for line in more)

    def styled(self, text: str, style: str) -> str:
        """A line in a style of rich's."""
        return self._text(Text(text, style=style))

    def _text(self, what: RenderableType) -> str:
        with self._console.capture() as captured:
            self._console.print(what)
        return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
