"""A row of the table as plain text, in a terminal, and the whole table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from .layout import Cell, Layout

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["NotebookTable", "as_html", "as_plain_text", "as_terminal_text"]

_GREEN, _RED = "#2e8b57", "#cd5c5c"  # legible on white and on black
_NO_CELL = Cell("-")


def as_plain_text(layout: Layout, cells: Mapping[str, Cell], *, with_header: bool) -> str:
    """Return the lines of one row; `*` marks a best value."""
    gap = " " * layout.gap
    lines: list[str] = []
    for names in layout.blocks():
        if with_header:
            lines.append(gap.join(_header(layout, name) for name in names).rstrip())
        parts = (_parts(layout, name, cells.get(name, _NO_CELL)) for name in names)
        lines.append(gap.join(f"{value}{mark}{change}" for value, mark, change in parts).rstrip())
    return "\n".join(lines)


def as_terminal_text(
    console: Console, layout: Layout, cells: Mapping[str, Cell], *, with_header: bool
) -> str:
    """Return the same for a terminal: ruled, the best value and what got better in green.

    Args:
        console: The terminal; nothing is written to it.
        layout: Its gap is filled with the rule, three characters wide.
        cells: By column.
        with_header: Whether the names of the columns stand above.
    """
    from rich.text import Text

    draws = console.encoding.lower().startswith("utf")
    bar, line, crossing = (" │ ", "─", "─┼─") if draws else (" | ", "-", "-+-")
    rule = Text.assemble((bar, "dim"))
    with console.capture() as capture:
        for names in layout.blocks():
            if with_header:
                header = [Text(_header(layout, name), style="bold") for name in names]
                console.print(rule.join(header), soft_wrap=True)
                lines = crossing.join(line * sum(layout.parts(name)) for name in names)
                console.print(Text(lines, style="dim"), soft_wrap=True)
            shown = [_styled(layout, name, cells.get(name, _NO_CELL)) for name in names]
            console.print(rule.join(shown), soft_wrap=True)
    return capture.get().rstrip("\n")


def as_html(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> str:
    """Return the whole table for a notebook, in the colors of its theme."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(_html_cell(row.get(name, _NO_CELL)) for name in columns)}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class NotebookTable:
    """One output of a notebook cell that grows: shown once, then replaced.

    Args:
        display: `IPython.display.display`.
    """

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None

    def show(self, html: str, text: str) -> None:
        """Show the table as it is now; *text* is for where HTML cannot be shown."""
        output = _Output(html, text)
        if self._handle is None:
            self._handle = self._display(output, display_id=True)
        else:
            self._handle.update(output)


class _Output:
    def __init__(self, html: str, text: str) -> None:
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    @override
    def __repr__(self) -> str:
        return self._text


def _header(layout: Layout, name: str) -> str:
    value, behind = layout.parts(name)
    return (
        f"{name.rjust(value)}{' ' * behind}" if len(name) <= value else name.rjust(value + behind)
    )


def _parts(layout: Layout, name: str, cell: Cell) -> tuple[str, str, str]:
    value, behind = layout.parts(name)
    mark = "" if not behind else "*" if cell.is_best else " "
    return cell.value.rjust(value), mark, cell.change.rjust(behind - 1) if behind > 1 else ""


def _styled(layout: Layout, name: str, cell: Cell) -> Any:
    from rich.text import Text

    value, mark, change = _parts(layout, name, cell)
    return Text.assemble(
        (value + mark, "bold green" if cell.is_best else ""),
        (change, {None: "dim", True: "green", False: "red"}[cell.is_better]),
    )


def _html_cell(cell: Cell) -> str:
    color = {None: "inherit;opacity:0.6", True: _GREEN, False: _RED}[cell.is_better]
    change = f' <small style="color:{color}">{cell.change}</small>' if cell.change else ""
    value = f'<b style="color:{_GREEN}">{cell.value}*</b>' if cell.is_best else cell.value
    return f'<td style="text-align:right;white-space:nowrap">{value}{change}</td>'
