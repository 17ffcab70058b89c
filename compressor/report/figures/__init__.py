"""The figures of a report, in the order in which the page shows them."""

from __future__ import annotations

from compressor.report.figures import accuracy, divergence, drafts, mixture, structure
from compressor.report.figures.base import Figure
from compressor.report.schema import Report


def figures(report: Report) -> list[Figure]:
    """Every figure that the report has numbers for."""
    single = [
        accuracy.pareto(report),
        accuracy.forest(report),
        accuracy.heatmap(report),
        divergence.ccdf(report),
        divergence.position(report),
    ]
    inside = [structure.waterfall(report), structure.cost(report)]
    stages = [*structure.layers(report), *mixture.mixtures(report)]
    found = [*single, *stages, *inside, *drafts.drafts(report)]
    return [figure for figure in found if figure is not None]
