"""Typefaces of drawn paper, found by name among Debian's packages of fonts and the pip packages of the needle boards.

Any of them may be missing: what is installed is used, and more of them make paper more varied. All of them:

    apt-get install fonts-liberation fonts-croscore fonts-freefont-ttf fonts-dejavu fonts-urw-base35 fonts-terminus \\
        fonts-3270 fonts-hack fonts-go fonts-inconsolata fonts-jetbrains-mono fonts-league-mono fonts-monoid \\
        fonts-mononoki fonts-agave fonts-hermit fonts-spleen fonts-proggy fonts-dotgothic16 fonts-ocr-a fonts-ocr-b \\
        fonts-arkpandora fonts-crosextra-carlito fonts-roboto-unhinted fonts-open-sans fonts-noto-core \\
        fonts-noto-mono fonts-clear-sans fonts-sil-andika fonts-cantarell fonts-cabin fonts-play
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from PIL import ImageFont

from qzoom_agent.errors import ConfigError

Style = Literal["mono", "sans", "bitmap"]
ROOTS: Final = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
FOLDER: Final = "NANO_FONTS"
"""Environment variable: a further folder of typefaces, for machines without Debian's packages."""
PACKAGES: Final = ("matplotlib", "font_lato", "font_source_sans_pro", "font_source_serif_pro", "font_hanken_grotesk")
_NAMES: Final[dict[Style, str]] = {
    "mono": (
        "LiberationMono-Regular LiberationMono-Bold Cousine-Regular Cousine-Bold DejaVuSansMono DejaVuSansMono-Bold "
        "FreeMono FreeMonoBold NimbusMonoPS-Regular NimbusMonoPS-Bold Hack-Regular Hack-Bold Go-Mono Go-Mono-Bold "
        "Inconsolata 3270-Regular 3270SemiCondensed-Regular 3270Condensed-Regular NotoSansMono-Regular "
        "NotoSansMono-Bold JetBrainsMono-Regular LeagueMono-NarrowRegular LeagueMono-Regular "
        "LeagueMono-CondensedMedium "
        "AerialMono AerialMonoBd OCRB OCRA Monoid-Regular mononoki-Regular mononoki-Bold agave-r-autohinted "
        "Hermit-medium"
    ),
    "sans": (
        "LiberationSans-Regular LiberationSans-Bold LiberationSansNarrow-Regular LiberationSansNarrow-Bold "
        "Arimo-Regular Arimo-Bold FreeSans FreeSansBold NimbusSans-Regular NimbusSans-Bold NimbusSansNarrow-Regular "
        "NimbusSansNarrow-Bold DejaVuSans DejaVuSans-Bold DejaVuSansCondensed DejaVuSansCondensed-Bold Aerial AerialBd "
        "Veranda VerandaBd Carlito-Regular Carlito-Bold Roboto-Regular Roboto-Bold RobotoCondensed-Regular "
        "RobotoCondensed-Bold OpenSans-Regular OpenSans-Semibold Go-Regular Go-Bold NotoSans-Regular NotoSans-Bold "
        "Lato-Regular Lato-Bold SourceSansPro-Semibold "
        "ClearSans-Regular ClearSans-Bold Andika-Regular Cantarell-Regular Cantarell-Bold Cabin-Regular Play-Regular "
        "LiberationSerif-Regular Tinos-Regular Tymes NimbusRoman-Regular LiberationSerif-Bold FreeSerif"
    ),
    "bitmap": (
        "TerminusTTF-4.46.0 spleen-12x24 spleen-8x16 spleen-16x32 DotGothic16-Regular 3270-Regular Cousine-Bold "
        "LiberationMono-Bold DejaVuSansMono DejaVuSansMono-Bold AerialMonoBd LiberationSans-Regular Aerial AerialBd "
        "Veranda LiberationSansNarrow-Regular LiberationSansNarrow-Bold ProggyTiny NimbusSansNarrow-Bold Hack-Bold "
        "NotoSansMono-Bold 3270Condensed-Regular LeagueMono-NarrowBold FreeMonoBold"
    ),
}
"""File names without suffix: even pitch, proportional, and those that stay legible as few dots."""
_SUFFIXES: Final = (".ttf", ".otf")


@lru_cache(maxsize=1)
def installed() -> dict[str, Path]:
    """Return the font files of this machine by name, without suffix."""
    found: dict[str, Path] = {}
    specs = [find_spec(name) for name in PACKAGES]
    folders = [Path(place) for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]
    own = [Path(os.environ[FOLDER])] if os.environ.get(FOLDER) else []
    for root in (*own, *ROOTS, *folders):
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in _SUFFIXES:
                found.setdefault(path.stem, path)
    return found


@lru_cache(maxsize=8)
def faces(style: Style) -> tuple[Path, ...]:
    """Return the installed typefaces of a style.

    Raises:
        ConfigError: none of them is installed.
    """
    known = installed()
    found = tuple(known[name] for name in _NAMES[style].split() if name in known)
    if not found:
        raise ConfigError(f"No typeface for drawn paper ({style}) is installed. Install Debian's fonts-liberation.")
    return found


@lru_cache(maxsize=2048)
def face(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Load a typeface at a size in pixels, without ligatures and shaping."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=200_000)
def advance(loaded: ImageFont.FreeTypeFont, char: str) -> float:
    """Return the width of a character in pixels."""
    return loaded.getlength(char)


@lru_cache(maxsize=4096)
def extent(loaded: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Return the top of capitals and the bottom of descenders, in pixels below the origin of text."""
    return int(loaded.getbbox("H")[1]), int(loaded.getbbox("gy,")[3])
