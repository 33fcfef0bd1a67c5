"""Pages that people look at: one episode, one look, charts and overlays."""

from qzoom_agent.report.episode import render_html, write_report

__all__ = ["render_html", "write_report"]
