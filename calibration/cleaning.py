"""Text as it should be read: without hard line ends, notices, spacing of tokenizers and HTML."""

from __future__ import annotations

import html
import html.parser
import re
import unicodedata
from collections.abc import Iterator

PIECE_CHARACTERS = 8_000


def tidy(text: str, blank: int = 1) -> str:
    """Normalise line ends, spaces and controls; keep at most `blank` empty lines in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\ufeff", ""))
    return re.sub(rf"\n{{{blank + 2},}}", "\n" * (blank + 1), text).strip("\n ")


def unwrap(text: str) -> str:
    """Join hard-wrapped prose lines; leave verse and other short-lined paragraphs alone."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.split("\n")]
        full = lines[:-1]
        wrapped = bool(full) and sum(map(len, full)) / len(full) > 52
        paragraphs.append(re.sub(" +", " ", " ".join(lines)) if wrapped else "\n".join(lines))
    return "\n\n".join(p for p in paragraphs if p)


def detokenise(text: str) -> str:
    """Undo WikiText's spacing: ` @-@ `, detached punctuation, brackets and quotes."""
    rules = [
        (r" @([-,.])@ ", r"\1"),
        (r" ([,.;:!?%)\]}])", r"\1"),
        (r"([(\[{$£]) ", r"\1"),
        (r" '(s|t|re|ve|m|ll|d)\b", r"'\1"),
        (r" ' ([^\n]{1,400}?) '(?=[ .,;:)]|$)", r" '\1'"),
        (r"(?<=s) '(?= )", "'"),
        (r'" ([^"\n]*?) "', r'"\1"'),
        (r"(\d) – (\d)", r"\1–\2"),
    ]
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def without_notices(code: str) -> str:
    """Drop comments that carry a copyright or licence notice: the same in every file."""
    notice = re.compile(r"copyright|licen[sc]e|spdx|@author", re.IGNORECASE)
    code = re.sub(
        r"/\*.*?\*/", lambda m: "" if notice.search(m[0]) else m[0], code, flags=re.DOTALL
    )
    head = re.match(r"(?:[ \t]*(?:#|//)[^\n]*\n|\s*\n)*", code)
    if head and notice.search(head[0]):
        code = code[head.end() :]
    return code


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> list[str]:
    """Cut a text at paragraph ends (failing that, line or sentence ends) into parts of at most
    `limit` characters."""
    parts: list[str] = []
    for paragraph in re.split(r"(?<=\n)\n+", text + "\n"):
        for block in [paragraph] if len(paragraph) <= limit else _lines(paragraph, limit):
            if parts and len(parts[-1]) + len(block) + 1 <= limit:
                parts[-1] += "\n" + block
            else:
                parts.append(block)
    return [part.strip("\n") for part in parts]


def _lines(paragraph: str, limit: int) -> Iterator[str]:
    block = ""
    for line in re.split(r"(?<=\n)|(?<=[.!?] )", paragraph):
        if block and len(block) + len(line) > limit:
            yield block
            block = ""
        block += line
    yield block


class Blocks(html.parser.HTMLParser):
    """Block texts of a handbook page, without navigation, listings and head matter."""

    HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
    LISTS = frozenset(["li", "ul", "ol", "dl", "dt", "dd"])
    TABLES = frozenset(["table", "tr", "td", "th"])
    BLOCK = frozenset(["div", "p", "blockquote", "body"]) | HEADINGS | LISTS | TABLES
    VOID = frozenset(["br", "img", "hr", "link", "meta", "input", "col"])
    MUTE = frozenset(["head", "pre", "script", "style"])

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._text: list[str] = []
        self._open: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a block, or mute one that is not running text."""
        if tag in self.VOID:
            return
        values = dict(attrs)
        furniture = "docnav" in (values.get("class") or "") or values.get("id") in (
            "banner",
            "title",
        )
        if tag in self.BLOCK:
            self._flush()
        self._open.append((tag, tag in self.MUTE or furniture))

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost open element of that name, and all inside it."""
        while any(name == tag for name, _ in self._open):
            if self._open[-1][0] in self.BLOCK:
                self._flush()
            if self._open.pop()[0] == tag:
                return

    def handle_data(self, data: str) -> None:
        """Collect text unless an enclosing element is muted."""
        if not any(muted for _, muted in self._open):
            self._text.append(data)

    def _flush(self) -> None:
        text = re.sub(r"\s+", " ", "".join(self._text)).strip()
        self._text = []
        if len(text) > 2:
            self.blocks.append(text)
