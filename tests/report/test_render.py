from __future__ import annotations

import html
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from compressor.errors import UsageError, VerificationError
from compressor.evaluation.results import Estimate
from compressor.formats.capabilities import ENGINES
from compressor.report import card, palette, tables
from compressor.report.build import build_report, check_evidence
from compressor.report.figures import figures
from compressor.report.figures.base import NARROW, WIDE
from compressor.report.html import to_html
from compressor.report.render import (
    FORMATS,
    load_report,
    render_folder,
    rendered,
    stale_files,
    write_report,
)
from compressor.report.schema import EngineCheck, Facts, Report
from compressor.report.snippets import load_snippets
from compressor.report.text import to_text
from tests.report import example

KEYS = [
    "pareto",
    "forest",
    "heatmap",
    "ccdf",
    "position",
    "layers-2-quantize-gptq",
    "mixture-1-prune-depth",
    "bytes",
    "cost",
]


@pytest.fixture(scope="module")
def report() -> Report:
    return example.report()


@pytest.fixture
def folder(tmp_path: Path, report: Report) -> Path:
    write_report(report, tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rendering_from_json_alone_gives_the_same_bytes(folder: Path, report: Report) -> None:
    before = contents(folder)
    assert len(before) == 3 + 2 * len(KEYS)
    for path in [p for p in folder.rglob("*") if p.is_file() and p.name != "report.json"]:
        path.unlink()
    assert render_folder(folder) == report
    assert contents(folder) == before
    write_report(load_report(folder), folder)
    assert contents(folder) == before


def test_figures_of_an_earlier_report_are_removed(folder: Path) -> None:
    leftover = folder / "figures" / "layers-old-light.svg"
    leftover.write_text("<svg/>")
    render_folder(folder)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["README.md", "report.html", "figures/bytes-light.svg"])
def test_a_mutated_number_in_a_rendered_file_is_found(folder: Path, name: str) -> None:
    assert stale_files(folder) == []
    path = folder / name
    text = path.read_text("utf-8")
    assert "112 MB" in text
    path.write_text(text.replace("112 MB", "98 MB"), "utf-8")
    assert stale_files(folder) == [name]


def test_a_mutated_number_in_the_json_is_refused(folder: Path) -> None:
    path = folder / "report.json"
    text = path.read_text("utf-8")
    document = json.loads(text)
    document["variants"][2]["size"]["bytes_on_disk"] //= 2
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(VerificationError, match="contradicts itself"):
        load_report(folder)
    path.write_text(text.replace("takes 112 MB on disk", "takes 99 MB on disk"), "utf-8")
    with pytest.raises(VerificationError, match="size"):
        load_report(folder)


def test_writing_refuses_a_report_that_does_not_follow(tmp_path: Path, report: Report) -> None:
    with pytest.raises(VerificationError):
        write_report(report.model_copy(update={"verdict": "PASS"}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no report\.json"),
        ("{", "not JSON"),
        ("[]", "not a report"),
        ('{"schema_version": "2.0.0"}', "/schema_version"),
    ],
)
def test_unreadable_reports_say_why(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_report(tmp_path)


class Page(HTMLParser):
    """Collects ids, references and table shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                self.references.append(str(value))


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def test_page_is_one_offline_file(report: Report) -> None:
    text = to_html(report)
    page = parsed(text)
    assert all(r.startswith("#") or r == "data:," for r in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert not {"script", "link-stylesheet", "iframe", "img", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 400_000


def test_page_has_every_figure_at_both_widths_and_unique_ids(report: Report) -> None:
    page = parsed(to_html(report))
    assert [figure.key for figure in figures(report)] == KEYS
    for key in KEYS:
        for name in (f"figure-{key}", f"fig-{key}-wide", f"fig-{key}-narrow"):
            assert page.ids.count(name) == 1
    assert len(page.ids) == len(set(page.ids))


def test_every_sentence_of_the_summary_is_a_claim_or_a_warning(report: Report) -> None:
    text = to_html(report)
    for name, statements in (("claims", report.claims), ("warnings", report.warnings)):
        block = re.search(rf'class="{name}".*?</ul>', text, re.DOTALL)
        assert block
        shown = [item.strip() for item in re.findall(r"<li>(.*?)</li>", block[0], re.DOTALL)]
        assert shown
        assert set(shown) <= {statement.text for statement in statements}


def test_hostile_text_stays_text(report: Report) -> None:
    evil = '<script>alert(1)</script> & "q" \x00\x1b[31m | `x`'
    facts = example.facts()
    variants = (facts.variants[0].model_copy(update={"label": evil}), *facts.variants[1:])
    token = facts.evaluations["2-quantize-gptq"].worst_tokens[0]
    last = facts.evaluations["2-quantize-gptq"].model_copy(
        update={"worst_tokens": [token.model_copy(update={"context": evil, "token": "</table>"})]}
    )
    evaluations = {**facts.evaluations, "2-quantize-gptq": last}
    hostile = build_report(
        facts.model_copy(update={"variants": variants, "evaluations": evaluations})
    )
    text = to_html(hostile)
    assert "<script" not in text
    assert parsed(text).tags.count("table") == parsed(to_html(report)).tags.count("table")
    assert "<script" not in card.to_markdown(hostile)
    for figure in figures(hostile):
        ET.fromstring(figure.standalone(palette.LIGHT))


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("key", KEYS)
def test_figures_are_accessible_and_stay_in_their_frame(
    report: Report, key: str, width: float
) -> None:
    figure = next(f for f in figures(report) if f.key == key)
    root = ET.fromstring(figure.standalone(palette.DARK, width))
    assert root.get("role") == "img"
    named = str(root.get("aria-labelledby")).split()
    assert [root.find(f"{SVG}title").get("id"), root.find(f"{SVG}desc").get("id")] == named
    assert len(str(root.findtext(f"{SVG}desc"))) > 20
    right, bottom = (float(v) for v in str(root.get("viewBox")).split()[2:])
    for element in root.iter():
        for name, most in (("x", right), ("x1", right), ("x2", right), ("cx", right)):
            if element.get(name) is not None:
                assert -1 <= float(str(element.get(name))) <= most + 1
        for name in ("y", "y1", "y2", "cy"):
            if element.get(name) is not None:
                assert -1 <= float(str(element.get(name))) <= bottom + 1
        assert "var(" not in str(element.text)


def test_bars_of_the_waterfall_are_as_long_as_their_bytes(report: Report) -> None:
    figure = next(f for f in figures(report) if f.key == "bytes")
    root = ET.fromstring(figure.inline(WIDE, "test"))
    bars = [(r.get("class"), float(str(r.get("width")))) for r in root.iter(f"{SVG}rect")]
    base, final = (width for cls, width in bars if cls == "fill0")
    sizes = report.variants[0].size.bytes_on_disk, report.variants[2].size.bytes_on_disk
    assert final / base == pytest.approx(sizes[1] / sizes[0], rel=1e-3)
    gone, come = (sum(w for cls, w in bars if cls == tone) for tone in ("cool", "warm"))
    assert base - gone + come == pytest.approx(final, abs=0.1)


def test_the_mixture_is_drawn_as_it_was(report: Report) -> None:
    """The curve of every domain ends where its last share is, on the scale of the axis."""
    figure = next(f for f in figures(report) if f.key == "mixture-1-prune-depth")
    assert "code: 16.7" in figure.description
    root = ET.fromstring(figure.standalone(palette.LIGHT, WIDE))
    lines = [str(line.get("points")).split() for line in root.iter(f"{SVG}polyline")]
    assert len(lines) == 2 * len(example.DOMAINS)
    assert {len(line) for line in lines} == {60}
    ends = dict(zip(example.DOMAINS, (line[-1] for line in lines), strict=False))
    shares = report.variants[1].stage.mixture.points[-1].shares
    heights = {name: float(point.split(",")[1]) for name, point in ends.items()}
    assert min(heights, key=heights.__getitem__) == "code" == max(shares, key=shares.__getitem__)
    bottom, unit = 250 - 44, (250 - 44 - heights["prose"]) / shares["prose"]
    assert heights["code"] == pytest.approx(bottom - unit * shares["code"], abs=0.2)
    one = report.variants[1].stage.mixture.points[:1]
    stage = report.variants[1].stage.model_copy(
        update={"mixture": report.variants[1].stage.mixture.model_copy(update={"points": one})}
    )
    variants = (report.variants[0], report.variants[1].model_copy(update={"stage": stage}))
    short = report.model_copy(update={"variants": (*variants, report.variants[2])})
    assert not any(f.key.startswith("mixture") for f in figures(short))


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK])
def test_text_has_enough_contrast(colours: dict[str, str]) -> None:
    texts = ["ink", "muted", "good", "bad", "unsure", *(f"s{i}" for i in range(palette.SERIES))]
    for name in texts:
        for ground in ("paper", "panel"):
            assert palette.contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)


def small(facts: Facts) -> list[Facts]:
    """Facts of runs that measured less, or something unusual."""
    base = facts.variants[0]
    alone = facts.model_copy(update={"variants": (base,), "evaluations": {}, "gates": ()})
    unmeasured = facts.model_copy(update={"evaluations": {}, "noise_floor": None, "gates": ()})
    same = example.evaluation("1-prune-depth", 0.0)
    zero = Estimate(value=0.0, low=0.0, high=0.0)
    score = same.overall.model_copy(update={"delta_bits_per_byte": zero})
    equal = facts.model_copy(
        update={
            "variants": facts.variants[:2],
            "evaluations": {
                "base": facts.evaluations["base"],
                "1-prune-depth": same.model_copy(
                    update={"overall": score, "domains": {"code": score}}
                ),
            },
        }
    )
    return [alone, unmeasured, equal]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_runs_that_measured_less_render(index: int, tmp_path: Path) -> None:
    report = build_report(small(example.facts())[index])
    write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert stale_files(tmp_path) == []
    assert to_text(report).startswith("HuggingFaceTB/SmolLM2-135M")
    for figure in figures(report):
        ET.fromstring(figure.standalone(palette.LIGHT, NARROW))


def test_many_variants_render_with_repeating_colours() -> None:
    facts = example.facts()
    base, pruned, _ = facts.variants
    many = tuple(
        pruned.model_copy(update={"id": f"v{i}", "label": f"Variant {i} with a rather long name"})
        for i in range(8)
    )
    evaluations = {"base": facts.evaluations["base"]}
    evaluations |= {f"v{i}": example.evaluation(f"v{i}", 0.1 + i / 4) for i in range(8)}
    report = build_report(
        facts.model_copy(update={"variants": (base, *many), "evaluations": evaluations})
    )
    assert "Variant 7" in rendered(report)["report.html"]


def front_matter(text: str) -> dict[str, object]:
    return YAML(typ="safe").load(io.StringIO(text.split("---\n")[1]))


def test_card_metadata(report: Report) -> None:
    found = front_matter(card.to_markdown(report))
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert found["base_model_relation"] == "finetune"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["license"] == "apache-2.0"
    assert {"compressor", "compressed-tensors", "4-bit", "quantize-gptq"} <= set(found["tags"])


def test_card_metadata_of_a_quantized_local_model() -> None:
    facts = example.facts()
    base, _, last = facts.variants
    base_facts = facts.base.model_copy(update={"licence": None, "id": "some/name"})
    variants = (base, last.model_copy(update={"parent": "base"}))
    evaluations = {k: v for k, v in facts.evaluations.items() if k != "1-prune-depth"}
    changes = {"base": base_facts, "variants": variants, "evaluations": evaluations}
    found = card.metadata(build_report(facts.model_copy(update=changes)))
    assert found["base_model_relation"] == "quantized"
    assert "license" not in found
    changes["base"] = facts.base.model_copy(update={"id": "builtin:tiny"})
    assert "base_model" not in card.metadata(build_report(facts.model_copy(update=changes)))


def test_card_says_what_the_report_says_and_shows_files_that_exist(
    folder: Path, report: Report
) -> None:
    text = (folder / "README.md").read_text("utf-8")
    for claim in report.claims:
        assert f"- {card.escape(claim.text)}\n" in text
    images = re.findall(r"!\[[^\]]*\]\(([^)#]+)#hf-(?:light|dark)-mode-only\)", text)
    assert len(images) == 2 * len(card.SHOWN)
    assert all((folder / image).is_file() for image in images)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == (2 + 3) + (2 + 3) + (2 + 7)


def test_the_worst_domain_by_kl_is_shown_everywhere() -> None:
    """It may be another one than that of bits per byte."""
    facts = example.facts()
    last = facts.evaluations["2-quantize-gptq"]
    assert last.worst is not None
    kl = Estimate(value=0.0612, low=0.0512, high=0.0712)
    worst = last.worst.model_copy(update={"kl_domain": "code", "kl": kl})
    evaluations = facts.evaluations | {last.variant: last.model_copy(update={"worst": worst})}
    report = build_report(facts.model_copy(update={"evaluations": evaluations}))
    page = to_html(report)
    for shown in (page, card.to_markdown(report), to_text(report)):
        assert "worst domain's KL" in html.unescape(shown)
        assert "code 0.061 ± 0.010" in shown
    assert "<dt>worst KL: code</dt>" in page
    (claim,) = (claim.text for claim in report.claims if claim.id == "worst-domain")
    assert "french in bits per byte" in claim
    assert "code in KL, 0.061" in claim


def test_every_format_says_how_it_was_measured_and_what_its_intervals_are(report: Report) -> None:
    """The ± of the worst domain is not that of the domain's own row, so each is explained."""
    shown = [html.unescape(to_html(report)), card.to_markdown(report), to_text(report)]
    for text in (" ".join(page.split()) for page in shown):
        assert "holds for the worst of all domains at once, that in the domain's own row" in text
        assert "a bootstrap over documents, Student's t where a domain has fewer than 8" in text
        assert re.search(r"suite(</dt><dd>| )standard", text)
        assert "predicted tokens" in text


def test_numbers_of_a_domain_have_intervals(report: Report) -> None:
    table = tables.domain_table(report, report.headline)
    prose = dict(zip(table.header, table.rows[0], strict=True))
    assert prose["perplexity"] == "13.78 ± 0.63"
    assert prose["ratio to base"] == "1.061 ± 0.010"
    assert prose["same top"] == "91.75 ± 0.42\u00a0%"


def test_text_fits_a_terminal_and_every_format_ends_with_a_newline(report: Report) -> None:
    assert max(len(line) for line in to_text(report).splitlines()) <= 125
    for form in ("html", "md", "json", "text"):
        assert FORMATS[form](report).endswith("\n")


def test_snippets_name_the_path() -> None:
    found = load_snippets("out/artifact", "gptq", every := {one.title for one in ENGINES.values()})
    assert found.keys() == every
    assert all("out/artifact" in code for code in found.values())
    for title in ("Transformers", "GPTQModel", "ONNX Runtime"):
        compile(found[title], "snippet", "exec")
    hub = load_snippets("org/name", "gguf", ["llama.cpp"], hub=True)
    assert hub == {"llama.cpp": "llama-server -hf org/name"}


def test_engines_that_would_refuse_a_deliverable_are_named_with_the_reason() -> None:
    facts = example.facts()
    artifact = facts.variants[-1].artifact
    assert artifact is not None
    refused = artifact.model_copy(update={"refusals": {"vLLM and SGLang": "q has 9 bits"}})
    report = build_report(facts.model_copy(update={"deliverables": (refused,)}))
    check_evidence(report)
    said = f"vLLM and SGLang would not load {artifact.path}: q has 9 bits."
    assert said in [warning.text for warning in report.warnings]
    assert said in card.to_markdown(report)


def test_snippets_say_what_was_tried() -> None:
    """An engine that was not asked, or failed, or was asked about other files, is not verified."""
    facts = example.facts()
    *others, last = facts.variants
    assert last.artifact is not None
    snippets = load_snippets(last.artifact.path, "compressed-tensors", ["Transformers", "vLLM"])
    variants = (*others, last.model_copy(update={"load_snippets": snippets}))
    check = EngineCheck(
        engine="vllm", title="vLLM", version="0.32.0", format="compressed-tensors",
        sha256=last.artifact.sha256, verdict="PASS", detail="it computes what was measured",
        arithmetic="bfloat16", tokens=100, difference=0.01, largest=0.1, bias=0.0, allowed=0.04,
        to_original=0.2, prompts=3, same_text=3, gap=0.0, gap_allowed=0.2, load_seconds=1.0,
        tokens_per_second=10.0,
    )  # fmt: skip

    def shown(**changes: object) -> tuple[str, ...]:
        checks = (check.model_copy(update=changes),) if changes else ()
        report = build_report(
            facts.model_copy(update={"variants": variants, "engine_checks": checks})
        )
        text, page = card.to_markdown(report), rendered(report)["report.html"]
        assert "Transformers (read back, 5.23.0):" in text
        said = re.findall(r"^vLLM \((.*)\):$", text, re.MULTILINE)
        assert said == re.findall(r"<p>vLLM \((.*)\)</p>", page)
        return tuple(said)

    assert shown(verdict="PASS") == ("verified, 0.32.0",)
    assert shown(verdict="FAIL") == ("failed its check",)
    assert shown() == shown(sha256="of other files") == ("not tried on these files",)
    assert shown(title="SGLang") == ("not tried on these files",)


def test_settings_leave_out_only_what_is_empty_or_off() -> None:
    params = {"bits": 4, "damping": 0.0, "act_order": True, "force": False, "ignore": [], "x": None}
    assert tables.settings(params) == "bits 4, damping 0.0, act_order"
    assert tables.settings({"targets": ["q_proj", "k_proj"]}) == "targets q_proj+k_proj"
    assert tables.settings({}) == "–"
