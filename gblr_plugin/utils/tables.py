"""Tables as text: one printer for all reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["aligned", "table"]


def aligned(rows: Sequence[Sequence[str]], *, left: Iterable[int] = (0,), gap: str = "  ") -> list[str]:
    """One line for each row, with the cells of a column below each other.

    Args:
        rows: Cells, as many in each row.
        left: Columns whose cells begin below each other; those of the others end below each other.
        gap: Between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_left = set(left)

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if place in to_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return gap.join(cells).rstrip()

    return [line(row) for row in rows]


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] | None = None,
    left: Iterable[int] = (0,),
    gap: str = "  ",
) -> list[str]:
    """A header, a rule, the rows, and below another rule their total; arguments as :func:`aligned` takes them."""
    lines = aligned([header, *rows, *([] if total is None else [total])], left=left, gap=gap)
    rule = "-" * max(map(len, lines))
    body = [lines[0], rule, *lines[1 : 1 + len(rows)]]
    return body if total is None else [*body, rule, lines[-1]]
