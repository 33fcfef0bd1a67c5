"""A page that people use in a browser (`qzoom web`); it needs the extra `[web]`."""

import os

from qzoom_agent.extras import require

require("gradio", extra="web", use="`qzoom web`")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
