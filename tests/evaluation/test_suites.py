"""Which text is taken: shipped suites, the user's files, contamination."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from compressor.errors import TextError, UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.contamination import contamination
from compressor.evaluation.suites import (
    EvaluationText,
    cut,
    load_suite,
    load_text,
    select,
    suite_names,
)
from compressor.text import Document, calibration_documents


def test_every_shipped_suite_has_text() -> None:
    assert suite_names() == ["full", "quick", "standard"]
    for name in suite_names():
        text = load_text(EvaluateConfig(suite=name))
        assert len(text.domains) == 6
        for documents in text.domains.values():
            assert len(documents) >= 12  # clusters enough for an interval
            assert len({document.id for document in documents}) == len(documents)


def test_quick_is_small_and_nested() -> None:
    quick, standard = (load_text(EvaluateConfig(suite=name)) for name in ("quick", "standard"))
    for domain, documents in quick.domains.items():
        size = sum(len(document.text.encode()) for document in documents)
        assert 8_000 < size <= 20 * 640
        assert {d.id for d in documents} <= {d.id for d in standard.domains[domain]}


def test_the_text_hash_sees_everything() -> None:
    quick = load_text(EvaluateConfig())
    assert quick.sha256 == load_text(EvaluateConfig()).sha256
    assert quick.sha256 != load_text(EvaluateConfig(documents=19)).sha256


def test_selection_ignores_the_order_of_rows() -> None:
    documents = [Document(str(i), "a", "x") for i in range(100)]
    chosen = select(documents, 10)
    assert chosen == select(documents[::-1], 10)
    assert {int(d.id) for d in chosen} != set(range(10))
    assert select(documents, 4) == chosen[:4]


@pytest.mark.parametrize("limit", range(12))
def test_cut_never_breaks_a_character(limit: int) -> None:
    text = "aé漢🙂z"
    assert text.startswith(cut(text, limit))
    assert len(cut(text, limit).encode()) <= limit
    assert cut(text, None) == text


def test_own_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text", encoding="utf-8")
    rows = [{"id": "x", "text": "first\u2028line"}, {"text": "second"}]
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8"
    )
    config = EvaluateConfig(text={"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.jsonl")})
    text = load_text(config)
    assert text.suite == "own text"
    assert [d.text for d in text.domains["a"]] == ["one text"]
    assert {d.text for d in text.domains["b"]} == {"first\u2028line", "second"}


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_of_another_encoding_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("né".encode("latin-1"))
    with pytest.raises(TextError, match=rf"{name} is not UTF-8 text \(byte 1\)"):
        load_text(EvaluateConfig(text={"own": str(tmp_path / name)}))


def test_missing_wikitext_says_how_to_fetch_it(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    with pytest.raises(TextError, match="not found") as caught:
        load_text(EvaluateConfig(text={"wikitext2": str(path)}, protocol="gptq"))
    assert "wikitext-2-raw-v1" in caught.value.hint
    assert str(path) in caught.value.hint


@pytest.mark.parametrize(
    "content", ['{"id": 1}', "[1]", "{", "\n\n", '{"text": null}', '{"text": 5}']
)
def test_broken_rows_are_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(TextError, match=r"bad\.jsonl"):
        load_text(EvaluateConfig(text={"bad": str(path)}))


def test_unknown_suites_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no evaluation suite 'quikc'"):
        load_suite("quikc")
    path = tmp_path / "s.yaml"
    path.write_text("description: x\ndomains: [prose]\ndocumnets: 3\n")
    with pytest.raises(UsageError, match="documnets"):
        load_suite(str(path))
    path.write_text("domains: [prose")
    with pytest.raises(UsageError, match=r"s\.yaml"):
        load_suite(str(path))
    with pytest.raises(ValidationError, match="even"):
        EvaluateConfig(protocol="llama.cpp", length=513)


def test_contamination_counts_shared_ngrams() -> None:
    words = [f"word{i}" for i in range(62)]
    code = "".join(f"x{i} = {i};\n" for i in range(40))
    text = EvaluationText(
        "x",
        {
            "prose": (Document("1", "prose", " ".join(words)),),
            "code": (Document("1", "code", code),),
        },
        "rolling",
        8,
    )
    clean = contamination(text, ["something else entirely " * 20])
    assert [(c.domain, c.ngram, c.overlap, c.contaminated) for c in clean] == [
        ("prose", 13, 0.0, False),
        ("code", 50, 0.0, False),
    ]
    # 37 consecutive words hold 25 of the 50 13-grams; case and punctuation do not hide them.
    prose, source = contamination(text, [", ".join(words[:37]).upper(), code.replace(" ", "\t")])
    assert prose.overlap == 0.5
    assert prose.contaminated
    assert source.overlap == 1.0


def test_twelve_shared_words_are_no_leak() -> None:
    words = " ".join(f"w{i}" for i in range(40))
    text = EvaluationText("x", {"prose": (Document("1", "prose", words),)}, "rolling", 8)
    assert contamination(text, [" ".join(words.split()[:12])])[0].overlap == 0
    assert contamination(text, [" ".join(words.split()[:13])])[0].overlap > 0


@pytest.mark.parametrize("domain", load_suite("full").domains)
def test_shipped_calibration_text_is_clean(domain: str) -> None:
    documents = load_text(EvaluateConfig(suite="full")).domains[domain]
    text = EvaluationText("x", {domain: documents}, "rolling", 8)
    (entry,) = contamination(text, (d.text for d in calibration_documents(domain)))
    assert not entry.contaminated
    (leaked,) = contamination(text, [d.text for d in documents[: len(documents) // 8]])
    assert leaked.contaminated


def test_what_recipes_import_is_light() -> None:
    """`compress --help` reads recipes' classes and must not wait for torch or scipy."""
    code = (
        "import sys, compressor.evaluation.config, compressor.evaluation.gates, "
        "compressor.evaluation.suites as s; "
        "sys.exit(' '.join({'torch', 'transformers', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
