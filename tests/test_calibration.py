"""Calibration batches: exact counts, seeded order, whole documents, clear refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from compressor import calibration, resources, text, text_sources
from compressor.calibration import CalibrationConfig, build_batches, load_documents, load_mix
from compressor.errors import AccessError, RecipeError, ResourceError, TextError

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resources.builtin_model("tiny"))


def rows(built: calibration.CalibrationSet) -> list[tuple[str, list[int]]]:
    return [
        (domain, ids[mask].tolist())
        for batch in built.batches
        for ids, mask, domain in zip(batch.input_ids, batch.mask, batch.domains, strict=True)
    ]


def small(**options: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"samples": 10, "length": 64, "batch_size": 4} | options)


def write_rows(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def test_default_mix_gives_exactly_the_rows_asked_for(tokenizer: Any) -> None:
    built = build_batches(small(samples=20), tokenizer)
    assert [len(batch.domains) for batch in built.batches] == [4, 4, 4, 4, 4]
    for batch in built.batches:
        assert batch.input_ids.shape == batch.mask.shape == (4, 64)
        assert batch.input_ids.dtype == torch.int64
        assert bool(batch.mask.all())
    shares = load_mix("default").domains
    assert built.tokens == {name: round(20 * share) * 64 for name, share in sorted(shares.items())}


def test_same_seed_same_bytes_other_seed_other_text(tokenizer: Any) -> None:
    first, again = (build_batches(small(), tokenizer) for _ in range(2))
    assert first.sha256 == again.sha256
    assert rows(first) == rows(again)
    other = build_batches(small(seed=1), tokenizer)
    assert other.sha256 != first.sha256
    assert {d.id for d in other.documents} != {d.id for d in first.documents}


def test_packed_rows_are_the_documents_in_order_with_end_tokens(tokenizer: Any) -> None:
    built = build_batches(small(mix="prose-only", samples=80, batch_size=100), tokenizer)
    stream: list[int] = []
    for document in built.documents:
        stream += [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
    windows = [stream[i : i + 64] for i in range(0, 80 * 64, 64)]
    assert sorted(ids for _, ids in rows(built)) == sorted(windows)
    assert len(stream) - len(tokenizer(built.documents[-1].text)["input_ids"]) <= 80 * 64
    assert len(built.documents) > 1


def test_rows_of_the_domains_are_interleaved(tokenizer: Any) -> None:
    order = [domain for domain, _ in rows(build_batches(small(samples=40), tokenizer))]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 10  # sorted by domain there would be 5


def test_unpacked_rows_are_heads_of_documents_padded_on_the_right(
    tokenizer: Any, tmp_path: Path
) -> None:
    written = ["Short.", "A somewhat longer line of text than that.", "word " * 200]
    source = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in written])
    built = build_batches(small(source=source, pack=False, samples=3), tokenizer)
    (batch,) = built.batches
    assert batch.input_ids.shape == (3, 64)
    lengths = batch.mask.sum(1)
    assert torch.equal(batch.mask, torch.arange(64) < lengths[:, None])
    heads = {tokenizer.decode(ids) for _, ids in rows(built)}
    assert {"Short.", "A somewhat longer line of text than that."} < heads
    assert sorted(lengths.tolist())[-1] == 64
    assert built.tokens == {"user": int(lengths.sum())}


def test_begin_token_stands_before_every_row_when_the_tokenizer_adds_it(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = AutoTokenizer.from_pretrained(resources.builtin_model("tiny"))
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", beginning.bos_token_id)]
    )
    plain, marked = (build_batches(small(), t) for t in (tokenizer, beginning))
    begin = beginning.bos_token_id
    for _, ids in rows(marked):
        assert ids[0] == begin
        assert begin not in ids[1:]
    assert all(ids[0] != begin for _, ids in rows(plain))


def test_calibration_never_reads_the_held_out_splits() -> None:
    used = {document.id for document in load_documents(CalibrationConfig())}
    for domain in text.evaluation_domains():
        assert not used & {d.id for d in text.evaluation_documents(domain)}
        assert not used & {d.id for d in text.calibration_documents(domain, "development")}


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(1, 500),
)
def test_apportion_is_exact_and_within_one_of_the_share(weights: list[int], total: int) -> None:
    shares = {f"d{i}": w / sum(weights) for i, w in enumerate(weights)}
    parts = calibration.apportion(shares, total)
    assert sum(parts.values()) == total
    assert all(abs(parts[name] - share * total) < 1 + 1e-6 for name, share in shares.items())


def test_apportion_gives_the_rest_to_the_largest_remainder() -> None:
    assert calibration.apportion({"a": 0.55, "b": 0.28, "c": 0.17}, 10) == {"a": 5, "b": 3, "c": 2}


@pytest.mark.parametrize("name", calibration.mixes())
def test_shipped_mixes_are_valid(name: str) -> None:
    mix = load_mix(name)
    assert mix.name == name
    assert mix.description


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ("{prose: 0.5, code: 0.4}", "sum to 0.9; they must sum to 1"),
        ("{prose: 1.5, code: -0.5}", "the share of 'code' is -0.5"),
        ("{prose: .nan}", "3:18: prose in domains must be a finite number, not nan"),
        ("{prosa: 1.0}", r"mine\.yaml:3:11: there is no domain 'prosa'"),
        ("{prose: [1}", r"mine\.yaml:3:20: not valid YAML"),
        ("7", r"mine\.yaml:3:10: domains must be a mapping, not 7"),
    ],
)
def test_broken_mixes_are_refused(tmp_path: Path, domains: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ndescription: x\ndomains: {domains}\n")
    with pytest.raises(RecipeError, match=message):
        load_mix(str(path))


def test_unknown_mix_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(TextError, match="no calibration mix 'prose_only'") as error:
        load_mix("prose_only")
    assert "did you mean 'prose-only'" in error.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "code", "source": "x"}, "exclude each other"),
        ({"column": "body"}, "`column` describes a `source`"),
        ({"samples": 0}, "greater than 0"),
        ({"lenght": 5}, "Extra inputs"),
    ],
)
def test_config_refuses_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CalibrationConfig(**options)


def test_defaults_may_be_spelled_out() -> None:
    full = CalibrationConfig(samples=4)
    assert CalibrationConfig.model_validate(full.model_dump()) == full
    own = CalibrationConfig(source="own.txt")
    assert CalibrationConfig.model_validate(own.model_dump()) == own


def test_too_little_text_says_how_much_there_is(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("One sentence only.")
    have = len(tokenizer("One sentence only.")["input_ids"]) + 1
    with pytest.raises(TextError, match=f"has {have} tokens .* 10 samples of 64 .* need 640"):
        build_batches(small(source=str(path)), tokenizer)
    with pytest.raises(TextError, match=r"domain 'prose' has .* tokens"):
        build_batches(small(mix="prose-only", samples=100_000), tokenizer)
    with pytest.raises(TextError, match="has 1 documents"):
        build_batches(small(source=str(path), pack=False), tokenizer)


BOOK = [{"text": f"Line {i} of a little book about nothing.", "n": i} for i in range(200)]


def as_jsonl(folder: Path) -> str:
    return write_rows(folder / "book.jsonl", BOOK)


def as_parquet(folder: Path) -> str:
    datasets.Dataset.from_list(BOOK).to_parquet(folder / "book.parquet")
    return str(folder / "book.parquet")


def as_folder(folder: Path) -> str:
    for row in BOOK:
        (folder / f"{row['n']:03d}.txt").write_text(row["text"])
    return str(folder)


def as_saved_dataset(folder: Path) -> str:
    datasets.Dataset.from_list(BOOK).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(BOOK)})
    both.save_to_disk(folder / "splits")
    return str(folder / "splits")


FORMS = [as_jsonl, as_parquet, as_folder, as_saved_dataset, as_saved_splits]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_source_gives_the_same_rows(
    form: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "reference").mkdir()
    reference = build_batches(small(source=as_jsonl(tmp_path / "reference")), tokenizer)
    (tmp_path / "form").mkdir()
    built = build_batches(small(source=form(tmp_path / "form")), tokenizer)
    assert built.sha256 == reference.sha256
    assert built.tokens == {"user": 640}
    written = {f"row {row['n']}": row["text"] for row in BOOK}
    assert all(written[document.id] == document.text for document in built.documents)


def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    talking = AutoTokenizer.from_pretrained(resources.builtin_model("tiny"))
    talking.chat_template = CHAT
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    source = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    config = small(source=source, chat_template=True)
    assert [d.text for d in load_documents(config, talking)] == [
        "[user] Hello?\n[assistant] Yes.\n"
    ]
    with pytest.raises(TextError, match="tokenizer has no chat template"):
        build_batches(config, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', {}, "has no column 'text'"),
        ("a.jsonl", '{"texts": "x"}\n', {"column": "text"}, "did you mean 'texts'"),
        ("a.jsonl", '{"text": ""}\n{"text": null}\n', {}, "column 'text' of .* holds no text"),
        ("a.jsonl", '{"text": [1]}\n', {}, "holds list, not text"),
        ("a.jsonl", '{"text": "x"}\nnonsense\n', {}, "a.jsonl:2 is not a row of JSON"),
        ("a.jsonl", "[1]\n", {}, "must be a JSON object"),
        ("a.jsonl", "", {}, "holds no text"),
        ("a.parquet", "nonsense", {}, "is not a parquet file"),
        ("a.csv", "text\nx\n", {}, r"must end in one of \.txt"),
    ],
)
def test_unusable_files_are_refused_with_one_sentence(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TextError, match=message):
        load_documents(small(source=str(path), **options))


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.jsonl does not exist"):
        load_documents(small(source=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(TextError, match="holds no file that ends in"):
        load_documents(small(source=str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(TextError, match="is not UTF-8"):
        load_documents(small(source=str(tmp_path / "latin.txt")))
    with pytest.raises(TextError, match="has no split 'test'"):
        load_documents(small(source=as_saved_splits(tmp_path), split="test"))


def test_unreachable_hub_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="'nobody/no-such-dataset' cannot be fetched") as error:
        load_documents(small(source="nobody/no-such-dataset"))
    assert "shipped mix" in error.value.hint
    assert error.value.exit_code == 3


def test_gated_missing_and_misnamed_datasets_are_told_apart() -> None:
    not_found = datasets.exceptions.DatasetNotFoundError
    for error, kind in [
        (not_found("Dataset 'a/b' is a gated dataset on the Hub."), AccessError),
        (not_found("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), TextError),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']"), TextError),
        (ConnectionError("no route"), ResourceError),
    ]:
        assert type(text_sources._hub_error("a/b", error)) is kind
