"""Tables of what was exported, and of what engines said about it."""

from __future__ import annotations

from compressor.report import numbers
from compressor.report.schema import Artifact, EngineCheck, Report
from compressor.report.tables import NONE, Table, or_none


def deliverable_table(report: Report) -> Table:
    """Every exported folder, and how far it was checked; no rows without an export."""
    base = report.variants[0].size.bytes_on_disk
    rows = (
        (
            item.format,
            item.path,
            or_none(item.bytes_on_disk, numbers.size),
            or_none(item.bytes_on_disk and base / item.bytes_on_disk, numbers.ratio),
            _read_back(item),
            ", ".join(item.load_snippets) or NONE,
        )
        for item in report.deliverables
    )
    return Table(
        "deliverables",
        "Exports of the last stage, all from the same codes, but for what a second quantizer "
        "rounded itself. Read back: largest difference between what the files hold and memory, of "
        "logits where Transformers loads the format, else of weights, relative to the largest in "
        "their matrix.",
        ("format", "folder", "on disk", "ratio", "read back", "loads in"),
        tuple(rows),
        frozenset({0, 1, 4, 5}),
    )


def assurance(report: Report, item: Artifact | None, engine: str) -> str:
    """What is known of an engine and these very files, in the words of who tries them.

    Args:
        report: that speaks of them.
        item: the deliverable; None where a variant has a snippet and no files of its own.
        engine: as snippets are called.
    """
    if item is None:
        return "not tried on these files"
    for check in report.engine_checks:
        if check.sha256 == item.sha256 and check.title == engine:
            version = check.version or "unknown version"
            return f"verified, {version}" if check.verdict == "PASS" else "failed its check"
    if engine == "Transformers" and item.reload_ok and item.max_logit_difference is not None:
        return f"read back, {report.env.transformers}"
    return "not tried on these files"


def _read_back(item: Artifact) -> str:
    if item.embedding is not None:
        return f"embedding rounded to {item.embedding} by {item.quantizer}"
    if item.quantizer is not None:
        return f"rounded by {item.quantizer}"
    if item.max_logit_difference is not None:
        return f"logits: {numbers.number(item.max_logit_difference)}"
    if item.max_weight_difference is not None:
        return f"weights: {numbers.number(item.max_weight_difference)}"
    if item.max_logprob_difference is not None:
        return f"log-probabilities: {numbers.number(item.max_logprob_difference)}"
    return "no: memory does not hold it"


def engine_table(report: Report) -> Table | None:
    """What engines said about the deliverables; None where none was asked."""
    rows = tuple(_engine_row(check) for check in report.engine_checks)
    return (
        Table(
            "engines",
            "Checked in engines by `compress serve-check`. Δ log p: mean absolute difference of a "
            "token's log-probability to what was measured, nats; allowed: a multiple of what the "
            "engine's arithmetic alone causes; original: the same difference to the model before "
            "any stage. Same text: prompts continued greedily as here. Speed: tokens a second, one "
            "text at a time, on the machine of the check.",
            (
                "engine",
                "format",
                "verdict",
                "computes in",
                "tokens",
                "Δ log p",
                "allowed",
                "original",
                "same text",
                "tokens / s",
            ),
            rows,
            frozenset({0, 1, 2, 3}),
        )
        if rows
        else None
    )


def _engine_row(check: EngineCheck) -> tuple[str, ...]:
    return (
        f"{check.title} {check.version}".rstrip(),
        check.format,
        check.verdict if check.verdict == "PASS" else f"{check.verdict}: {check.detail}",
        check.arithmetic or NONE,
        numbers.count(check.tokens) if check.tokens else NONE,
        or_none(check.difference, numbers.number),
        or_none(check.allowed, numbers.number),
        or_none(check.to_original, numbers.number),
        f"{check.same_text} of {check.prompts}" if check.prompts else NONE,
        or_none(check.tokens_per_second, numbers.number),
    )
