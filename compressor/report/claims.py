"""What a report says of its headline: each sentence with the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.report.draft_statements import draft_claims
from compressor.report.schema import Report, Statement
from compressor.report.statements import Document, engine_statement, pointer, state


def claims_of(report: Report, document: Document) -> Iterator[Statement]:
    """Of sizes, quality, gates, files, engines and drafts, in the order of the report.

    Args:
        report: without its sentences.
        document: the same as JSON, which pointers lead into.
    """
    yield from _size_claims(report, document)
    yield from _quality_claims(report, document)
    yield from _layer_claims(report, document)
    yield from _gate_claims(report, document)
    yield from _artifact_claims(report, document)
    yield from _engine_claims(report, document)
    yield from draft_claims(report, document)


def _place(report: Report, variant: str) -> int:
    return [v.id for v in report.variants].index(variant)


def _size_claims(report: Report, document: Document) -> Iterator[Statement]:
    place = _place(report, report.headline)
    if place == 0:
        return
    size = ("variants", place, "size")
    yield state(
        document,
        "size",
        "{label} takes {bytes} on disk where the base takes {base}: a ratio of {ratio}.",
        label=(pointer("variants", place, "label"), "text"),
        bytes=(pointer(*size, "bytes_on_disk"), "bytes"),
        base=(pointer("variants", 0, "size", "bytes_on_disk"), "bytes"),
        ratio=(pointer(*size, "ratio_total"), "ratio"),
    )
    yield state(
        document,
        "bits",
        "Its tensors hold {checkpoint} bits per parameter of the base, ties counted once.",
        checkpoint=(pointer(*size, "bits_checkpoint"), "bits"),
    )
    if report.variants[place].size.by_role.codes:
        yield state(
            document,
            "matrices",
            "The quantized matrices hold {linear} bits per weight, scales and zero-points counted.",
            linear=(pointer(*size, "bits_linear"), "bits"),
        )


def _quality_claims(report: Report, document: Document) -> Iterator[Statement]:
    """What was measured of the headline against the base."""
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None:
        return
    if evaluation.overall.delta_bits_per_byte is not None:
        overall = ("evaluations", report.headline, "overall")
        yield state(
            document,
            "quality",
            "Averaged over domains, bits per byte differ from the base by {delta}, "
            "measured on {tokens} tokens of {documents} documents.",
            delta=(pointer(*overall, "delta_bits_per_byte"), "delta"),
            tokens=(pointer(*overall, "tokens"), "count"),
            documents=(pointer(*overall, "documents"), "count"),
        )
    if evaluation.worst is not None:
        worst = ("evaluations", report.headline, "worst")
        yield state(
            document,
            "worst-domain",
            "The worst domain is {domain} in bits per byte, {delta}, and {kl_domain} in KL, "
            "{kl} nats per token; both intervals hold for the worst of all domains at once.",
            domain=(pointer(*worst, "domain"), "text"),
            delta=(pointer(*worst, "delta_bits_per_byte"), "delta"),
            kl_domain=(pointer(*worst, "kl_domain"), "text"),
            kl=(pointer(*worst, "kl"), "estimate"),
        )
    if evaluation.overall.divergence is not None:
        yield from _divergence_claims(report, document)


def _divergence_claims(report: Report, document: Document) -> Iterator[Statement]:
    divergence = ("evaluations", report.headline, "overall", "divergence")
    yield state(
        document,
        "divergence",
        "The KL divergence from the base is {mean} nats per token on average and {tail} nats at "
        "the 99.9 % quantile; the most likely token agrees at {agreement} of positions.",
        mean=(pointer(*divergence, "mean"), "estimate"),
        tail=(pointer(*divergence, "p999"), "number"),
        agreement=(pointer(*divergence, "top1_agreement", "value"), "share"),
    )
    if report.noise_floor is not None:
        yield state(
            document,
            "noise-floor",
            "The base against itself in another batch size gives {mean} nats per token: "
            "differences as small as that are arithmetic noise.",
            mean=(pointer("noise_floor", "mean", "value"), "number"),
        )


def _layer_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, item in enumerate(report.attribution):
        if item.median_loss is None:
            continue
        variant = _place(report, item.variant)
        facts = report.variants[variant].stage
        simple = facts.simple_method if facts else ""
        yield state(
            document,
            f"layers-{item.variant}",
            f"{{label}}: {{method}} leaves a median relative layer error of {{loss}}; {simple} "
            "would leave {baseline}.",
            label=(pointer("variants", variant, "label"), "text"),
            method=(pointer("variants", variant, "stage", "method"), "text"),
            loss=(pointer("attribution", place, "median_loss"), "number"),
            baseline=(pointer("attribution", place, "median_baseline_loss"), "number"),
        )


def _gate_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, gate in enumerate(report.gates):
        entry = ("gates", place)
        in_bytes = gate.gate.endswith("bytes")
        measured = (*entry, "estimate", "value") if in_bytes else (*entry, "estimate")
        yield state(
            document,
            f"gate-{place}",
            "{verdict} on {gate}: measured {estimate}, the limit is {limit}.",
            verdict=(pointer(*entry, "verdict"), "text"),
            gate=(pointer(*entry, "gate"), "text"),
            estimate=(pointer(*measured), "bytes" if in_bytes else "estimate"),
            limit=(pointer(*entry, "limit"), "bytes" if in_bytes else "number"),
        )


_QUANTIZER = (
    "{label} is the work of a second quantizer, {quantizer}: it rounded the weights of {parent} "
    "itself, and none of our codes are in its file."
)

_EMBEDDING = (
    "{label} holds the codes of {parent} as they are; its embedding, and a head that was dense, "
    "are rounded by {quantizer}, which this row measures."
)


def _artifact_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, variant in enumerate(report.variants):
        if variant.artifact is None or not variant.artifact.reload_ok:
            continue
        artifact = ("variants", place, "artifact")
        if variant.artifact.quantizer is not None:
            yield state(
                document,
                f"quantizer-{variant.id}",
                _EMBEDDING if variant.artifact.embedding else _QUANTIZER,
                label=(pointer("variants", place, "label"), "text"),
                quantizer=(pointer(*artifact, "quantizer"), "text"),
                parent=(pointer("variants", place, "parent"), "text"),
            )
            continue
        found = next(key for key in _READ_BACK if getattr(variant.artifact, key) is not None)
        asked = {check.sha256 for check in report.engine_checks if check.verdict == "PASS"}
        ran = found != "max_weight_difference" or variant.artifact.sha256 in asked
        yield state(
            document,
            f"reload-{variant.id}",
            "{label} was read back from disk as {format}; "
            + ("" if ran else _NOT_ASKED)
            + _READ_BACK[found],
            label=(pointer("variants", place, "label"), "text"),
            format=(pointer(*artifact, "format"), "text"),
            difference=(pointer(*artifact, found), "number"),
        )


_READ_BACK = {
    "max_logit_difference": "its logits differ from those in memory by at most {difference}.",
    "max_weight_difference": "the weights it holds differ from those in memory by at most "
    "{difference} of the largest in their matrix.",
    "max_logprob_difference": "log-probabilities that its engine computes differ from those in "
    "memory by at most {difference} nats.",
}

_NOT_ASKED = "no engine loaded it here, but "


def _engine_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, check in enumerate(report.engine_checks):
        if check.verdict == "PASS":
            yield engine_statement(
                place,
                document,
                "{title} {version} computes from {format} what was measured: over {tokens} tokens "
                "its log-probabilities differ by {difference} nats on average, and up to {allowed} "
                "would be its arithmetic.",
                tokens=("tokens", "count"),
                difference=("difference", "number"),
                allowed=("allowed", "number"),
            )
