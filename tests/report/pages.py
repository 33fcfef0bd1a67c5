"""Pages as a browser reads them."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page as a browser's tokenizer sees it: tags with attributes, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inline: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.inline[self._open[-1]] = self.inline.get(self._open[-1], "") + data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def shape(self) -> list[tuple[str, tuple[tuple[str, str | None], ...]]]:
        """Tags and attributes, but for the texts that are allowed to differ: a CSP's hashes and an image's bytes."""
        return [
            (tag, tuple((k, v) for k, v in attrs.items() if k not in ("src", "content"))) for tag, attrs in self.tags
        ]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for one, attrs in self.tags if one == tag]

    def having(self, cls: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if cls in (attrs.get("class") or "").split()]
