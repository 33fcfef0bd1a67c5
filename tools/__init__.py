"""Zoom and propose: the tools a model may call, and their schemas."""

if __name__ != "qzoom_agent.tools":
    raise ImportError("this folder is the package qzoom_agent.tools: write 'import qzoom_agent.tools' (not 'import tools')")
