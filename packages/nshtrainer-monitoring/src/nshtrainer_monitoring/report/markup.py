"""Pieces of HTML; whatever is not ours passes `esc`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["details", "esc", "facts", "section", "table"]

# Control characters are errors in HTML, and lone surrogates (which JSON can hold) cannot be written.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def esc(value: object) -> str:
    """*value* as text of a page, in an element or in a quoted attribute."""
    return html.escape(_NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()
) -> str:
    """A table.

    Args:
        head: Titles of the columns, as text.
        rows: Cells, as HTML.
        numbers: Columns that are aligned to the right.
    """
    right = set(numbers)
    kinds = [' class="num"' if i in right else "" for i in range(len(head))]
    top = "".join(
        f'<th scope="col"{kind}>{esc(t)}</th>' for t, kind in zip(head, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, the latter as HTML; without a value a name is left out."""
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def details(summary: str, body: str, *, note: str = "") -> str:
    """Something that is folded away."""
    extra = f' <span class="muted">{esc(note)}</span>' if note else ""
    return f"<details><summary>{esc(summary)}{extra}</summary>\n{body}\n</details>"


def section(anchor: str, title: str, body: str) -> str:
    """A part of the page, to which the head of the page leads."""
    return f'<section id="{esc(anchor)}"><h2>{esc(title)}</h2>\n{body}\n</section>'
