"""Views of a conversation: a coarse view and two crops."""

from qzoom_agent.views import View


def view(name: str, width: int, height: int) -> View:
    kind, box = "coarse" if name == "coarse" else "crop", (0, 0, width, height)
    return View(id=name, parent=None, kind=kind, box=box, width=width, height=height, digest="0" * 64, tokens=1)


COARSE, CROP1, CROP2 = view("coarse", 448, 336), view("crop1", 224, 140), view("crop2", 140, 140)
