# SPDX-License-Identifier: Apache-2.0
"""Tables of text: for a terminal, and in Markdown."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def lines(rows: Rows, alignment: str = "lr") -> list[str]:
    """Lays cells out in columns that are two spaces apart.

    Args:
      rows: The cells of each; a row may end early.
      alignment: "l" or "r" for each column; the last one also for those that follow.

    Returns:
      A line for each row, without spaces at its end.
    """
    columns = max(map(len, rows), default=0)
    widths = [max(len(r[i]) for r in rows if len(r) > i) for i in range(columns)]

    def padded(index: int, cell: str) -> str:
        left = alignment[min(index, len(alignment) - 1)] == "l"
        return cell.ljust(widths[index]) if left else cell.rjust(widths[index])

    return [
        "  ".join(padded(index, cell) for index, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def ruled(rows: Rows, alignment: str = "lr") -> list[str]:
    """Lays cells out as `lines` does, with a rule below the first row.

    Args:
      rows: The cells of each, the heading first.
      alignment: As for `lines`.

    Returns:
      The lines, one more than there are rows.
    """
    first, *others = lines(rows, alignment)
    return [first, "-" * max(map(len, (first, *others))), *others]


def markdown(rows: Rows) -> list[str]:
    """Writes cells as a table in Markdown.

    Args:
      rows: The cells of each, the heading first.

    Returns:
      The lines, one more than there are rows.
    """
    head, *others = rows
    written = [head, ["---"] * len(head), *others]
    return ["| " + " | ".join(row) + " |" for row in written]
