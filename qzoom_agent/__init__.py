"""Thinking with images: zoom tools, learned perception and a LangGraph loop."""

__version__ = "0.1.0"
