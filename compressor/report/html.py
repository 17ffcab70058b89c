"""`report.html`: one file, no script, no request; light, dark, narrow and on paper."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compressor.evaluation.results import INTERVALS, Evaluation
from compressor.report import delivery_tables, draft_tables, numbers, palette, tables
from compressor.report.figures import figures
from compressor.report.figures.base import NARROW, WIDE, Figure, compared, labels_of
from compressor.report.schema import Report
from compressor.report.tables import Table

SIGNS = {"PASS": "✓", "FAIL": "✕", "INCONCLUSIVE": "?", "NO GATES": "–"}


@dataclass(frozen=True)
class Tile:
    """One number of the verdict strip."""

    name: str
    value: str
    unit: str
    detail: str


def environment() -> Environment:
    """Jinja with escaping on and no undefined names."""
    loader = PackageLoader("compressor.report")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        size=numbers.size,
        duration=numbers.duration,
        count=numbers.count,
        share=numbers.share,
        moment=numbers.moment,
    )
    return made


def to_html(report: Report) -> str:
    """The whole page."""
    page = environment().get_template("report.html.j2")
    drawn = {figure.key: figure for figure in figures(report)}
    return page.render(
        report=report,
        tiles=tiles(report),
        signs=SIGNS,
        labels=labels_of(report),
        headline=next(v for v in report.variants if v.id == report.headline),
        figures=drawn,
        intervals=INTERVALS,
        settings=tables.settings,
        assurance=delivery_tables.assurance,
        layer_keys=[key for key in drawn if key.startswith(("layers-", "mixture-"))],
        draft_keys=[
            key for key in drawn if key.startswith(("acceptance-", "speedup-", "training-"))
        ],
        inline=_inline,
        light=Markup(palette.variables(palette.LIGHT)),
        dark=Markup(palette.variables(palette.DARK)),
        figure_css=Markup(palette.figure_css()),
        **_tables(report),
    )


def _inline(figure: Figure) -> Markup:
    """Both drawings of a figure; the style sheet shows the one that fits."""
    return Markup(
        f'<div class="wide">{figure.inline(WIDE, "wide")}</div>'
        f'<div class="narrow">{figure.inline(NARROW, "narrow")}</div>'
    )


def _tables(report: Report) -> dict[str, object]:
    return {
        "sizes": tables.size_table(report),
        "quality": tables.quality_table(report),
        "domain_tables": _domain_tables(report),
        "divergence": tables.divergence_table(report),
        "stages": tables.stage_table(report),
        "notes": tables.notes_table(report),
        "drafts": draft_tables.draft_tables(report),
        "deliverables": delivery_tables.deliverable_table(report) if report.deliverables else None,
        "engines": delivery_tables.engine_table(report),
        "worst_tokens": tables.worst_token_table(report),
        "fallbacks": tables.fallback_table(report),
        "contamination": tables.contamination_table(report),
        "protocol": tables.protocol_of(report),
    }


def _domain_tables(report: Report) -> list[Table]:
    """The headline first, the others after it."""
    names = sorted(compared(report), key=lambda name: name != report.headline)
    return [tables.domain_table(report, name) for name in names]


def tiles(report: Report) -> list[Tile]:
    """The numbers of the verdict strip, all of the headline variant."""
    base = report.variants[0].size
    size = next(v for v in report.variants if v.id == report.headline).size
    sizes = f"{numbers.size(base.bytes_on_disk)} → {numbers.size(size.bytes_on_disk)}"
    linear = f"{numbers.bits(size.bits_linear)} in the matrices" if size.by_role.codes else "dense"
    found = [
        Tile("size on disk", numbers.ratio(size.ratio_total), "smaller", sizes),
        Tile("checkpoint", numbers.bits(size.bits_checkpoint), "bits / weight", linear),
    ]
    evaluation = report.evaluations.get(report.headline)
    return found if evaluation is None else found + _quality_tiles(evaluation)


def _quality_tiles(evaluation: Evaluation) -> list[Tile]:
    found = []
    worst, divergence = evaluation.worst, evaluation.overall.divergence
    if worst is not None:
        delta = worst.delta_bits_per_byte
        value, detail = numbers.value_of(delta, True), f"95 %: {numbers.limits(delta, True)}"
        found.append(Tile(f"worst domain: {worst.domain}", value, "bits / byte", detail))
    if divergence is not None:
        mean, detail = divergence.mean, f"95 %: {numbers.limits(divergence.mean)}"
        found.append(Tile("mean KL", numbers.value_of(mean), "nats / token", detail))
    if worst is not None:
        value, detail = numbers.value_of(worst.kl), f"95 %: {numbers.limits(worst.kl)}"
        found.append(Tile(f"worst KL: {worst.kl_domain}", value, "nats / token", detail))
    if divergence is not None:
        agreement = f"same top token: {numbers.share(divergence.top1_agreement.value)}"
        found.append(Tile("99.9 % KL", numbers.number(divergence.p999), "nats", agreement))
    return found
