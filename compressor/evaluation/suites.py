"""Which documents are evaluated: suites, the shipped text, the user's own text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from compressor import resources
from compressor.diagnose import read_model
from compressor.errors import RecipeError, TextError, UsageError, guess
from compressor.evaluation.config import EvaluateConfig, ProtocolName, Suite
from compressor.text import (
    Document,
    evaluation_documents,
    evaluation_domains,
    json_row,
    read_utf8,
)

_WIKITEXT = (
    "python -c \"from datasets import load_dataset as d; open('{path}', 'w').write('\\n\\n'.join("
    "d('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')['text']))\""
)


@dataclass(frozen=True)
class EvaluationText:
    """The text of one evaluation, before any tokenizer.

    Attributes:
        suite: name for the protocol.
        domains: domain -> documents, in a fixed order; a document is the unit of resampling.
        protocol: how windows are cut.
        length: tokens per window that were asked for.
        length_is_fixed: the user asked for `length`; a model that is shorter is refused.
        documents_limit: documents per domain that were asked for.
    """

    suite: str
    domains: dict[str, tuple[Document, ...]]
    protocol: ProtocolName
    length: int
    length_is_fixed: bool = False
    documents_limit: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of every domain name, document id and text, in order."""
        digest = hashlib.sha256()
        for domain, documents in self.domains.items():
            for document in documents:
                for part in (domain, document.id, document.text):
                    digest.update(part.encode() + b"\0")
        return digest.hexdigest()


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in (resources.evals() / "suites").glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a shipped suite by name, or any by path.

    Raises:
        UsageError: there is no such suite.
        RecipeError: the file breaks a rule; carries every problem found.
    """
    path = resources.evals() / "suites" / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = suite_names()
        hint = f"{guess(name, known)}shipped: {', '.join(known)}"
        raise UsageError(f"no evaluation suite {name!r}", hint)
    suite, source = read_model(path, Suite, "the suite")
    known = list(evaluation_domains())
    if unknown := [name for name in suite.domains if name not in known]:
        raise RecipeError(
            source.problem(
                ("domains", suite.domains.index(name)),
                f"there is no domain {name!r} with evaluation text",
                f"{guess(name, known)}domains: {', '.join(known)}",
            )
            for name in unknown
        )
    return suite


def load_text(config: EvaluateConfig) -> EvaluationText:
    """Collect the documents that `config` asks for.

    Raises:
        TextError: a file is missing or holds no text.
        UsageError: the suite is unknown.
    """
    suite = load_suite(config.suite)
    limit = config.documents or suite.documents
    domains = (
        {name: select(_user_documents(name, Path(file)), config.documents)
         for name, file in config.text.items()}
        if config.text
        else {name: _shipped_documents(name, limit, suite.bytes_per_document)
              for name in suite.domains}
    )  # fmt: skip
    return EvaluationText(
        suite="own text" if config.text else config.suite,
        domains=domains,
        protocol=config.protocol or suite.protocol,
        length=config.length or suite.length,
        length_is_fixed=config.length is not None,
        documents_limit=config.documents if config.text else limit,
    )


def select(documents: Iterable[Document], limit: int | None) -> tuple[Document, ...]:
    """At most `limit` documents, spread over the whole split.

    The order is that of a hash of the id: no preference for the first rows of a file, the same on
    every machine, and a smaller limit yields a subset of what a larger one yields.
    """
    ranked = sorted(documents, key=lambda doc: hashlib.sha256(doc.id.encode()).digest())
    return tuple(ranked[:limit])


def cut(text: str, limit: int | None) -> str:
    """The longest beginning of `text` with at most `limit` UTF-8 bytes and no broken character."""
    if limit is None:
        return text
    return text.encode()[:limit].decode(errors="ignore")


def _shipped_documents(
    domain: str, limit: int | None, bytes_per_document: int | None
) -> tuple[Document, ...]:
    return tuple(
        replace(document, text=cut(document.text, bytes_per_document))
        for document in select(evaluation_documents(domain), limit)
    )


def _user_documents(domain: str, path: Path) -> list[Document]:
    if not path.is_file():
        fetch = _WIKITEXT.format(path=path) if "wikitext" in domain.lower() else ""
        raise TextError(f"evaluation text of domain {domain!r} not found: {path}", fetch)
    if path.suffix == ".jsonl":
        return _rows(domain, path)
    text = read_utf8(path)
    if not text.strip():
        raise TextError(f"{path} holds no text")
    return [Document(path.name, domain, text)]


def _no_row(path: Path, number: int, why: str) -> TextError:
    return TextError(
        f"{path}:{number} is not an evaluation row: {why}",
        'every line is a JSON object with "text" and, if known, "id"',
    )


def _rows(domain: str, path: Path) -> list[Document]:
    documents = []
    # Lines end at "\n" only: str.splitlines would also break a row at U+2028 inside the text.
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_row(line)
        except ValueError as error:
            raise _no_row(path, number, str(error)) from None
        if not isinstance(row, dict) or "text" not in row:
            raise _no_row(path, number, 'it has no "text"')
        if not isinstance(row["text"], str):
            raise _no_row(path, number, f'"text" holds {type(row["text"]).__name__}, not text')
        if row["text"].strip():
            documents.append(Document(str(row.get("id", number)), domain, row["text"]))
    if not documents:
        raise TextError(f"{path} holds no text")
    return documents
