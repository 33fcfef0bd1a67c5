"""Copy the typefaces of drawn paper to a folder, for a machine that cannot install Debian's packages.

python rl/pack_typefaces.py runs/typefaces
NANO_FONTS=runs/typefaces python rl/train_nano.py ...          (on the other machine)
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from nano.typefaces import Style, faces
from qzoom_agent.errors import finished


def pack(folder: Path) -> int:
    """Copy every installed typeface that drawn paper uses, and return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {path for style in get_args(Style) for path in faces(style)}
    for path in sorted(found):
        shutil.copy(path, folder / path.name)
    return len(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    print(f"{options.folder}: {pack(options.folder)} typefaces")
    return 0


if __name__ == "__main__":
    sys.exit(finished("rl/pack_typefaces.py", main))
