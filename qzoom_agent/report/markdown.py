"""Tables in Markdown, and shares in percent."""

from collections.abc import Iterable, Sequence


def percent(value: float, digits: int = 0) -> str:
    """Return a share in percent, with as many digits as it takes to tell it from 0 % and from 100 %."""
    for more in range(digits, 5):
        text = f"{100 * value:.{more}f}"
        if not 0 < value < 1 or float(text) not in (0, 100):
            return f"{text}%"
    return f"{value:.{digits}%}"  # of no more than rounding errors


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a line for each row, without a newline at the end."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
