"""Models behind one small interface: `base` says what a backend is, `scripted` plays back replies, `hf` runs weights.

Importing this package loads neither torch nor transformers; `qzoom_agent.models.hf` does.
"""

from qzoom_agent.models.interface import Backend, ImageSource, Reply, SamplingParams, Session
from qzoom_agent.models.scripted import ScriptedBackend

__all__ = ["Backend", "ImageSource", "Reply", "SamplingParams", "ScriptedBackend", "Session"]
