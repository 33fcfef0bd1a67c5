"""Whether a recipe's `report_to` can be had, asked before a run begins and not when its first figure is reported."""

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from qzoom_agent.errors import ConfigError, MissingDependency


def require_tracker(name: str) -> None:
    """The tracker `report_to` is one that transformers knows, and installed.

    Raises:
        ConfigError, MissingDependency: it is not.
    """
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if name in ("none", "all", *installed):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        names = ", ".join(INTEGRATION_TO_CALLBACK)
        raise ConfigError(f"There is no tracker '{name}' for report_to. Choose from none, {names}.")
    raise MissingDependency(
        f"report_to: {name} needs the package of that tracker, which is not installed. Install it (for most: pip "
        f"install {name}), or set report_to: none."
    )
