"""Pages that people look at: one episode, one look, charts and overlays."""
