"""Typefaces for the boards, all from pip packages, so that a seed draws the same pixels everywhere.

`TRAIN` and `OOD` are disjoint families: a score on the `ood` split is a score on letter shapes that no training image
had. Sizes are given as the height of a capital letter in pixels, because that is what decides whether a glyph is
legible; point sizes mean different things in different typefaces.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import ImageFont

from qzoom_agent.errors import ConfigError
from qzoom_agent.extras import require

TRAIN: Final = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneralBol.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/cmss10.ttf"),
    ("font_source_sans_pro", "files/SourceSansPro-Semibold.ttf"),
    ("font_source_sans_pro", "files/SourceSansPro-Bold.ttf"),
    ("font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf"),
    ("font_hanken_grotesk", "files/HankenGrotesk-Medium.otf"),
    ("font_hanken_grotesk", "files/HankenGrotesk-Bold.otf"),
    ("font_lato", "files/Lato-Regular.ttf"),
    ("font_lato", "files/Lato-Bold.ttf"),
)
OOD: Final = (
    ("font_manrope", "files/Manrope-SemiBold.ttf"),
    ("font_manrope", "files/Manrope-Bold.ttf"),
    ("font_caladea", "files/Caladea-Bold.ttf"),
    ("font_rhd", "files/RedHatDisplay-Medium.ttf"),
    ("font_rhd", "files/RedHatDisplay-Bold.ttf"),
)
SUFFIXES: Final = (".ttf", ".otf")


@lru_cache(maxsize=8)
def typefaces(split: str, folder: Path | None = None) -> tuple[Path, ...]:
    """Return the font files of a split, or those below `folder` (sorted by name) when one is given.

    Raises:
        ConfigError: `folder` holds no .ttf or .otf file.
        MissingDependency: a font package is not installed.
    """
    if folder is not None:
        found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES))
        if not found:
            raise ConfigError(
                f"No typeface found: {folder} holds no {' or '.join(SUFFIXES)} file. Give a folder of fonts."
            )
        return found
    return tuple(
        require(package, extra="eval", use="Drawing boards") / name
        for package, name in (OOD if split == "ood" else TRAIN)
    )


@lru_cache(maxsize=64)
def _capital_share(path: Path) -> float:
    """Return the height of a capital as a share of the font size."""
    box = ImageFont.truetype(path, 200).getbbox("H")
    return max(float(box[3] - box[1]), 1.0) / 200


@lru_cache(maxsize=1024)
def font(path: Path, capital: int) -> ImageFont.FreeTypeFont:
    """Return the typeface at the size whose capitals are `capital` pixels tall.

    Raises:
        ConfigError: the file is not a font that FreeType can read.
    """
    try:
        return ImageFont.truetype(path, max(6, round(capital / _capital_share(path))))
    except OSError as error:
        raise ConfigError(f"Cannot read the typeface {path}: {error}. Remove it from the folder of fonts.") from error
