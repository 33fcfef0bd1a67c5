"""The agent behind an OpenAI-compatible API (`qzoom serve`); it needs the extra `[serve]`."""

from qzoom_agent.extras import require

for package in ("fastapi", "uvicorn", "prometheus_client"):
    require(package, extra="serve", use="`qzoom serve`")
