"""Figures and tables of drafts: what they draw is what was measured."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from compressor.report import draft_tables, palette
from compressor.report.build import build_report
from compressor.report.figures import figures
from compressor.report.figures.drafts import drafts, predictions
from compressor.report.html import to_html
from compressor.report.schema import Report
from tests.report import example

ID = "4-draft.standalone"


@pytest.fixture(scope="module")
def report() -> Report:
    return build_report(example.facts().model_copy(update={"drafts": (example.draft(0.9),)}))


def test_every_draft_has_its_figures(report: Report) -> None:
    keys = [figure.key for figure in figures(report)]
    assert keys[-3:] == [f"acceptance-{ID}", f"speedup-{ID}", f"training-{ID}"]
    page = to_html(report)
    for key in keys[-3:]:
        assert f'id="figure-{key}"' in page


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [820.0, 350.0])
def test_they_are_drawn_inside_their_box(
    report: Report, colours: dict[str, str], width: float
) -> None:
    for figure in drafts(report):
        root = ElementTree.fromstring(figure.standalone(colours, width))
        _, _, right, bottom = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for name, most in (("x", right), ("x1", right), ("x2", right), ("y", bottom)):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= most + 1
            for x, y in re.findall(r"([-\d.]+),([-\d.]+)", element.attrib.get("points", "")):
                assert -1 <= float(x) <= right + 1
                assert -1 <= float(y) <= bottom + 1
        assert colours["paper"] in figure.standalone(colours, width)


def test_predictions_are_the_formula(report: Report) -> None:
    (draft,) = report.drafts
    speed = draft.measurement.speeds[0]
    found = predictions(draft, speed)
    assert found == pytest.approx([1.5 / (0.24 + 1.05), 1.7 / (0.48 + 1.1), 1.75 / (0.72 + 1.2)])


def test_the_fit_is_told_with_its_interval(report: Report) -> None:
    *_, curve = drafts(report)
    assert "doubling of training brought 0.145 (95 % interval 0.0970 to 0.194)" in curve.caption


def test_a_draft_without_a_curve_has_no_such_figure(report: Report) -> None:
    (draft,) = report.drafts
    bare = report.model_copy(update={"drafts": (draft.model_copy(update={"curve": None}),)})
    assert [figure.key for figure in drafts(bare)] == [f"acceptance-{ID}", f"speedup-{ID}"]


def test_tables_show_domains_and_leave_out_what_is_not_there(report: Report) -> None:
    tables = {table.key: table for table in draft_tables.draft_tables(report)}
    assert list(tables) == ["drafts", f"acceptance-{ID}", f"speed-{ID}"]
    assert [row[0] for row in tables[f"speed-{ID}"].rows] == list(example.DOMAINS)
    assert tables[f"speed-{ID}"].rows[0][1:] == ("1.07×", "0.90×")
