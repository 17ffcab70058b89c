"""`README.md` of a run: a model card that says what the report says and nothing else."""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML

from compressor.report import delivery_tables, draft_tables, numbers, tables
from compressor.report.figures import figures
from compressor.report.html import environment
from compressor.report.schema import Report, Variant
from compressor.report.tables import Table

SHOWN = ("pareto", "forest", "heatmap", "ccdf", "bytes")  # figures of the card

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_RESHAPING = ("prune.", "recover.")


def to_markdown(report: Report) -> str:
    """The model card."""
    page = environment()
    page.autoescape = False
    page.filters["md"] = escape
    headline = next(v for v in report.variants if v.id == report.headline)
    return page.get_template("card.md.j2").render(
        report=report,
        headline=headline,
        lineage=lineage(report),
        front_matter=_yaml(metadata(report)),
        figures=[figure for figure in figures(report) if figure.key in SHOWN],
        sizes=_markdown(tables.size_table(report)),
        quality=_captioned(tables.quality_table(report)),
        deliverables=_markdown(delivery_tables.deliverable_table(report))
        if report.deliverables
        else "",
        engines=_engines(report),
        drafts=_markdown(draft_tables.draft_speeds(report)) if report.drafts else "",
        domains=_captioned(tables.domain_table(report, report.headline))
        if report.headline in report.evaluations
        else "",
        protocol=tables.protocol_of(report),
        settings=tables.settings,
        assurance=delivery_tables.assurance,
        duration=numbers.duration,
    )


def _engines(report: Report) -> str:
    table = delivery_tables.engine_table(report)
    return _markdown(table) if table else ""


def lineage(report: Report) -> list[Variant]:
    """The headline variant and its ancestors, from the first stage on."""
    by_id = {variant.id: variant for variant in report.variants}
    found, place = [], by_id[report.headline]
    while place.parent is not None:
        found.append(place)
        place = by_id[place.parent]
    return found[::-1]


def metadata(report: Report) -> dict[str, Any]:
    """Front matter as the Hub defines it.

    `base_model` stands there only for a Hub id, `license` only when it is known. The Hub knows
    no relation for a pruned model; `finetune` is the one for changed weights of new shape.
    """
    methods = [v.stage.method for v in lineage(report) if v.stage is not None]
    found: dict[str, Any] = {}
    if _HUB_ID.fullmatch(report.base.id):
        reshaped = any(method.startswith(_RESHAPING) for method in methods)
        found["base_model"] = report.base.id
        found["base_model_relation"] = "finetune" if reshaped else "quantized"
    found |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if report.base.licence is not None:
        found["license"] = report.base.licence
    found["tags"] = _tags(report, methods)
    return found


def _tags(report: Report, methods: list[str]) -> list[str]:
    headline = next(v for v in report.variants if v.id == report.headline)
    names = [method.replace(".", "-") for method in methods]
    formats = [headline.artifact.format.split()[0]] if headline.artifact else []
    bits = [f"{headline.size.bits_nominal:g}-bit"] if headline.size.bits_nominal < 16 else []
    return list(dict.fromkeys(["compressor", report.base.family, *names, *formats, *bits]))


def _yaml(value: dict[str, Any]) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.dump(value, stream)
    return stream.getvalue()


def escape(text: str) -> str:
    """Text that Markdown shows as it is, also in a table cell."""
    flat = " ".join(str(text).split("\n"))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


def _captioned(table: Table) -> str:
    return f"{_markdown(table)}\n\n{escape(table.caption)}"


def _markdown(table: Table) -> str:
    rule = ["---" if place in table.words else "---:" for place in range(len(table.header))]
    rows = [table.header, *table.rows]
    cells = [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
