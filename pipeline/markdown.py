"""Markdown tables that line up in a terminal too. Called by the ledgers and reports of the stages."""

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table: its first `texts` columns are text, to the left; the others are numbers, to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def drawn(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        padded = (cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in enumerate(cells))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([drawn(head), f"|{rule}|", *map(drawn, rows)])
