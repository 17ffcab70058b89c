"""The shipped text: hashes, licences, and splits that share no run of 13 words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import archives
import build_text
import cleaning
import pytest

from compressor import resources, text
from compressor.errors import TextError

DOMAINS = ("code", "docs", "encyclopedia", "multilingual", "prose", "speeches")
NGRAM = 13


def splits() -> Iterator[tuple[str, str, list[text.Document]]]:
    for domain in DOMAINS:
        for split in ("calibration", "development"):
            yield domain, split, text.calibration_documents(domain, split)
        yield domain, "evaluation", text.evaluation_documents(domain)


def runs(written: str) -> Iterator[int]:
    """Hashes of the runs of 13 words; a Han, Hiragana or Katakana character is a word."""
    found = re.sub(r"([぀-ヿ㐀-鿿])", r" \1 ", written.lower())
    found_words = re.findall(r"\w+", found)
    for start in range(len(found_words) - NGRAM + 1):
        yield hash(tuple(found_words[start : start + NGRAM]))


def overlap(documents: list[text.Document], held: set[int]) -> int:
    return sum(run in held for document in documents for run in runs(document.text))


@pytest.mark.parametrize("folder", ["calibration", "evals"])
def test_manifest_lists_every_shard_with_its_size(folder: str) -> None:
    root = getattr(resources, folder)()
    listed = text.shards(root)
    on_disk = {p.relative_to(root).as_posix() for p in (root / "text").rglob("*.jsonl")}
    assert {shard.path for shard in listed} == on_disk
    for shard in listed:
        data = (root / shard.path).read_bytes()
        assert (len(data), data.count(b"\n")) == (shard.bytes, shard.documents)


def test_every_domain_has_three_splits_and_the_total_is_bounded() -> None:
    total = 0
    for folder in (resources.calibration(), resources.evals()):
        total += sum(shard.bytes for shard in text.shards(folder))
    assert total < 25e6
    assert text.evaluation_domains() == DOMAINS
    smallest = {"calibration": 2.5e6, "development": 130e3, "evaluation": 280e3}
    for domain, split, documents in splits():
        size = sum(len(document.text.encode()) for document in documents)
        assert size > smallest[split], (domain, split)


def test_rows_carry_source_and_licence_and_are_of_reasonable_size() -> None:
    manifest = json.loads((resources.calibration() / "manifest.json").read_text())
    packages = {s["package"] for shard in manifest["shards"] for s in shard["sources"]}
    for domain, _, documents in splits():
        assert len({document.id for document in documents}) == len(documents)
        for document in documents:
            assert document.domain == domain
            assert document.source in packages
            assert document.license
            assert 100 <= len(document.text) <= 8_000


def test_licences_name_every_package() -> None:
    table = (resources.calibration() / "LICENSES.md").read_text()
    manifest = json.loads((resources.calibration() / "manifest.json").read_text())
    for source in (s for shard in manifest["shards"] for s in shard["sources"]):
        name, version = source["package"].split(":", 1)[1].rsplit("@", 1)
        assert f"{name} {version}" in table


def test_splits_share_no_run_of_thirteen_words() -> None:
    by_split: dict[str, list[text.Document]] = {}
    for _, split, documents in splits():
        by_split.setdefault(split, []).extend(documents)
    held = {run for document in by_split["evaluation"] for run in runs(document.text)}
    assert len(held) > 200_000
    assert overlap(by_split["development"], held) == 0
    held |= {run for document in by_split["development"] for run in runs(document.text)}
    assert overlap(by_split["calibration"], held) == 0
    leaked = by_split["evaluation"][0]
    assert overlap([leaked], held) == len(list(runs(leaked.text))) > 0


def test_no_group_stands_in_two_splits() -> None:
    seen: dict[tuple[str, str], str] = {}
    for domain, split, documents in splits():
        for document in documents:
            group = document.id.split("#")[0]
            if domain == "multilingual":  # a page in all its languages
                group = group.split("/")[1]
            assert seen.setdefault((domain, group), split) == split, group


def test_changed_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "evals"
    shutil.copytree(resources.evals(), folder)
    shard = folder / "text" / "prose" / "evaluation-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(TextError, match=r"prose.*not the file that the manifest describes"):
        text.read_domain(folder, "prose", "evaluation")
    shard.unlink()
    with pytest.raises(TextError, match="missing"):
        text.read_domain(folder, "prose", "evaluation")
    (folder / "manifest.json").write_text('{"format": 2, "shards": []}')
    with pytest.raises(TextError, match="format 1"):
        text.shards(folder)


def test_unknown_domain_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="'speech'") as error:
        text.evaluation_documents("speech")
    assert "did you mean 'speeches'" in error.value.hint
    with pytest.raises(TextError, match=r"manifest\.json"):
        text.shards(tmp_path)


def test_pieces_lose_nothing_and_respect_the_limit() -> None:
    written = "\n\n".join(f"Paragraph {i}. " + "More words here. " * (i % 40) for i in range(60))
    parts = cleaning.pieces(written, limit=500)
    assert max(map(len, parts)) <= 500
    assert " ".join(" ".join(parts).split()) == " ".join(written.split())


def test_cleaning() -> None:
    raw = 'The 2 @.@ 5 @-@ ton ship ( built 1901 ) , " the Ox " , didn \'t sink .'
    assert cleaning.detokenise(raw) == 'The 2.5-ton ship (built 1901), "the Ox", didn\'t sink.'
    notice = "/* Copyright (c) X. All rights reserved. */\nint f(void); /* keep */\n"
    assert cleaning.without_notices(notice).strip() == "int f(void); /* keep */"
    assert cleaning.without_notices("# License: MIT\n# Y\nimport os\n") == "import os\n"
    wrapped = "a" * 60 + "\n" + "b" * 60 + "\nend"
    assert cleaning.unwrap(wrapped) == wrapped.replace("\n", " ")
    assert cleaning.unwrap("Roses are red\nViolets are blue") == "Roses are red\nViolets are blue"


def test_shared_sentence_is_cut_and_a_copy_is_dropped() -> None:
    fill = "This part is our own and nobody else has ever written it. " * 8
    shared = " ".join(f"word{i}" for i in range(20)) + ". "
    held = build_text.ngrams(shared)
    draft = build_text.Draft("a", "a", 0, archives.RXJS, fill + shared + fill)
    cut = build_text.cut_shared(draft, held)
    assert "word0" not in cut.text
    assert not build_text.ngrams(cut.text) & held
    assert len(cut.text) >= len(fill) * 2 - 2
    copy = build_text.Draft("b", "b", 0, archives.RXJS, shared * 20)
    assert build_text.cut_shared(copy, held) is None


def test_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / archives.RXJS.filename).write_bytes(b"not the package")
    with pytest.raises(RuntimeError, match=r"rxjs-7\.8\.1\.tgz: sha256 is"):
        archives.Store(tmp_path).archive(archives.RXJS)
