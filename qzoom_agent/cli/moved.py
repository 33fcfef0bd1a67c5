"""Commands that left the package: they say which script took their place."""

from __future__ import annotations

from collections.abc import Sequence

from qzoom_agent.errors import ConfigError

SCRIPTS = {"base": "rl/train_nano.py", "reproduce": "rl/reproduce.py"}


def main(argv: Sequence[str]) -> int:
    """Refuse, and name the script of the source checkout that does the work now.

    Raises:
        ConfigError: always.
    """
    name = argv[0] if argv and argv[0] in SCRIPTS else "reproduce"
    rest = " ".join(argv[1:] if name == "base" else argv)
    raise ConfigError(
        f"This command is a script of the source checkout now. Run there: python {SCRIPTS[name]} {rest}".rstrip()
    )
