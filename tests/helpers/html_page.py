"""Reads an HTML page strictly: every tag is closed in order."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "wbr"}


class Checked(HTMLParser):
    """Every tag is closed in order; gathers attributes by tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.tables, self.cell = [], [], [], None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
