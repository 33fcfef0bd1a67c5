"""Put the figure and the tables of `qzoom bench pareto` into README.md and docs/results.md.

    qzoom bench pareto --n 500 --out runs/pareto
    python evals/pareto_pages.py runs/pareto

They replace what stands between `<!-- pareto:begin -->` and `<!-- pareto:end -->` of each page.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile

from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.files import read_text

BEGIN, END = "<!-- pareto:begin -->", "<!-- pareto:end -->"


def put(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page. Raises ConfigError if it has none."""
    whole = read_text(page, "Give the folder of a checkout.")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ConfigError(f"{page} has no place for results. Write {BEGIN} and {END} on lines of their own.")
    before, after = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of qzoom bench pareto")
    parser.add_argument("--checkout", type=Path, default=Path(), help="folder of the documents (default: this one)")
    options = parser.parse_args(argv)
    summary, every = read_text(options.run / "pareto.md").strip().split("\n\n")
    docs = options.checkout / "docs"
    put(options.checkout / "README.md", f"![Accuracy over cost](docs/images/pareto.png)\n\n{summary}")
    put(docs / "results.md", f"![Accuracy over cost](images/pareto.png)\n\n{summary}\n\n{every}")
    (docs / "images").mkdir(exist_ok=True)
    copyfile(options.run / "pareto.png", docs / "images" / "pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(finished("pareto_pages", main))
