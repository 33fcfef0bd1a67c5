"""Models behind one small interface.

    interface.py   Backend, Session, Reply
    presets.py     model names and what is known about them
    hf.py          local weights; hf_session.py one conversation, hf_batch.py many at once,
                   hf_generation.py choosing tokens, and their text
    prompts.py     messages to token ids and back
    scheduler.py   requests of many threads as one batch
    server.py      an OpenAI-compatible server
    scripted.py    scripted replies
    convert.py     branch files to published checkpoints and back

Importing this package loads neither torch nor transformers; `qzoom_agent.models.hf` does.
"""

from qzoom_agent.models.interface import Backend, ImageSource, Reply, SamplingParams, Session
from qzoom_agent.models.scripted import ScriptedBackend

__all__ = ["Backend", "ImageSource", "Reply", "SamplingParams", "ScriptedBackend", "Session"]
