"""Results as text for a person or as JSON for a program. Loads nothing heavy by itself."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor import resources
from compressor.errors import CompressorError, UsageError, _ProblemsError

if TYPE_CHECKING:
    from compressor.engine import RunOutcome
    from compressor.evaluation.results import Estimate, Evaluation, GateVerdict
    from compressor.explain import Topic
    from compressor.formats.capabilities import Container, Engine
    from compressor.plan import Plan
    from compressor.recheck import Check
    from compressor.report.schema import EngineCheck

_WIDTH = 96


class Row(NamedTuple):
    """One line of `compress ls`."""

    name: str
    description: str
    group: str = ""  # under which heading


def as_json(data: Any) -> str:
    """A JSON document, as a person would indent it."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)


def error_data(error: CompressorError) -> dict[str, Any]:
    """An error for a program: its type, sentence, hint, exit code and problems."""
    problems = error.problems if isinstance(error, _ProblemsError) else ()
    return {
        "error": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "problems": [vars(problem) for problem in problems],
    }


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first row being the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------- plan and run


def plan_text(plan: Plan) -> str:
    """What will happen, what it costs, and how sure that is."""
    columns = "stage parameters matrices bits linear checkpoint tensors memory time"
    rows: list[tuple[str, ...]] = [tuple(columns.split())]
    rows += [
        (
            stage.method,
            f"{stage.parameters:,}",
            str(stage.matrices),
            f"{stage.bits_nominal:.2f}",
            f"{stage.bits_linear:.3f}",
            f"{stage.bits_checkpoint:.3f}",
            size(stage.packed_bytes),
            "≈ " + size(stage.peak_bytes),
            "≈ " + duration(stage.seconds),
        )
        for stage in plan.stages
    ]
    exports = [
        f"export {export.format}: {size(export.tensor_bytes)}, {_shrunk(export.ratio)}"
        for export in plan.exports
    ]
    exports += [
        f"export {export.format}: {remark}" for export in plan.exports for remark in export.remarks
    ]
    remarks = [f"{stage.method}: {remark}" for stage in plan.stages for remark in stage.remarks]
    base = f"{plan.family}, {plan.parameters:,} parameters, {size(plan.base_bytes)}"
    tokens = f"{plan.calibration_tokens:,} to calibrate, about {plan.evaluation_tokens:,} to score"
    total = (
        f"in all: about {duration(plan.seconds)} ({plan.rate[1]}), "
        f"{size(plan.peak_bytes)} of memory, at most {size(plan.disk_bytes)} of disk"
    )
    heads = [f"{plan.model}: {base}", f"tokens: {tokens}"]
    stages = [table(rows)] if plan.stages else []
    return "\n".join([*heads, *stages, *remarks, *exports, *_efforts(plan), total])


def _shrunk(ratio: float) -> str:
    """How large the base is beside what becomes of it, in words."""
    if f"{ratio:.2f}" == "1.00":
        return "no smaller"
    return f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"


def _efforts(plan: Plan) -> list[str]:
    """How long each effort of the recipe takes, where there is a choice."""
    if not plan.efforts:
        return []
    times = [
        f"{name}{' (this)' if name == plan.effort else ''} "
        + ("cannot work on this model" if seconds is None else f"≈ {duration(seconds)}")
        for name, seconds in plan.efforts.items()
    ]
    return [f"--effort: {', '.join(times)}"]


def checks_text(checks: Sequence[Check]) -> str:
    """One line a check; a dash where it could not be made here."""
    marks = {True: "ok", False: "FAILED", None: "-"}
    rows = [(check.folder, check.name, marks[check.passed], check.detail) for check in checks]
    return table([("checkpoint", "check", "", "found"), *rows])


def engine_checks_text(checks: Sequence[EngineCheck]) -> str:
    """What an engine said about each deliverable: the verdict, then the numbers behind it."""
    return "\n".join(line for check in checks for line in _engine_check(check))


def _engine_check(check: EngineCheck) -> list[str]:
    head = f"{check.verdict}  {check.title} {check.version}".rstrip()
    lines = [f"{head}, {check.format}: {check.detail}"]
    if check.difference is not None:
        lines += [
            f"  log-probabilities  {check.difference:.3g} nats from ours on average over "
            f"{check.tokens} tokens, allowed {check.allowed:.3g} ({check.arithmetic})",
            f"  greedy text        {check.same_text} of {check.prompts} as ours; at most "
            f"{check.gap:.3g} nats below the best token, allowed {check.gap_allowed:.3g}",
        ]
    if check.to_original is not None:
        lines.append(f"  original model     {check.to_original:.3g} nats away")
    if check.tokens_per_second is not None:
        lines.append(f"  speed              {check.tokens_per_second:.0f} tokens/s, one text")
    if check.load_seconds is not None:
        lines.append(f"  loading            {check.load_seconds:.1f} s")
    return lines


def publication_text(done: dict[str, Any]) -> str:
    """Repositories with their files, or with the revision once they are on the Hub."""
    lines: list[str] = []
    for repository in done["repositories"]:
        seen = "public" if done["public"] else "private"
        state = repository["revision"] or "would be uploaded"
        lines.append(f"{repository['name']} ({seen}, {size(repository['bytes'])}): {state}")
        if not repository["revision"]:
            lines += [f"  {name}" for name in repository["files"]]
    lines += [f"licence: {action}" for action in done["actions"]]
    lines += [f"collection: {done['collection']}"] if done["collection"] else []
    return "\n".join(lines)


def outcome(result: RunOutcome) -> dict[str, Any]:
    """A finished run for a program."""
    return {
        "folder": str(result.folder),
        "verdict": result.verdict,
        "report": result.report.model_dump(),
    }


def outcome_text(result: RunOutcome) -> str:
    """A finished run for a person: the report in short, and where it is."""
    from compressor.report.text import to_text

    return f"{to_text(result.report).rstrip()}\n\n{result.folder / 'report.html'}"


def evaluation_text(
    results: Sequence[Evaluation], verdicts: Iterable[GateVerdict] | None = None
) -> str:
    """One line a model, then one a domain of the last model, the worst domain, the gates."""
    from compressor.evaluation.results import INTERVALS

    protocol, text = results[0].protocol, results[0].overall
    head = (
        f"protocol {protocol.id}, suite {protocol.suite}, windows of {protocol.length} tokens, "
        f"bos {protocol.bos}, text {protocol.text_sha256[:12]}\n"
        f"{text.tokens} predicted tokens of {text.documents} documents\n"
        f"[95 % interval]: {INTERVALS}"
    )
    rows: list[tuple[str, ...]] = [("model", *_SCORES)]
    rows += [_score_row(result.variant, result.overall) for result in results]
    domains: list[tuple[str, ...]] = [("domain", *_SCORES)]
    domains += [_score_row(name, score) for name, score in results[-1].domains.items()]
    worst = results[-1].worst
    found = []
    if worst:
        found.append(f"worst: {worst.domain}, {estimate(worst.delta_bits_per_byte)} bits/byte more")
        found.append(f"worst: {worst.kl_domain}, KL {estimate(worst.kl)} nats")
        found.append("(intervals that hold for the worst of all domains at once)")
    gates = [verdict.sentence for verdict in verdicts or ()]
    return "\n".join([head, table(rows), "", table(domains), *found, *gates])


_SCORES = ("perplexity", "bits/byte", "Δ bits/byte", "KL, nats", "99.9 % KL", "same top-1")


def _score_row(name: str, score: Any) -> tuple[str, ...]:
    distance = score.divergence
    return (
        name,
        estimate(score.perplexity),
        estimate(score.bits_per_byte),
        estimate(score.delta_bits_per_byte),
        estimate(distance and distance.mean),
        f"{distance.p999:.3g}" if distance else "-",
        f"{distance.top1_agreement.value:.1%}" if distance else "-",
    )


def estimate(value: Estimate | None) -> str:
    """A value with its 95 % interval."""
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.value:.4g}"
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"


# ---------------------------------------------------------------------- what there is


def listing(kind: str) -> list[Row]:
    """What `compress ls KIND` shows."""
    if kind == "methods":
        return _methods()
    if kind == "engines":
        from compressor.formats.capabilities import ENGINES

        return [Row(name, _engine(engine)) for name, engine in ENGINES.items()]
    if kind == "formats":
        from compressor.formats.capabilities import CONTAINERS

        return [Row(name, f"{what}; {_loaded_by(name)}") for name, what in CONTAINERS.items()]
    if kind == "models":
        from compressor.model.families import FAMILIES

        tiny = Row("builtin:tiny", "ships with the package; works offline")
        names = ", ".join(sorted({family.name for family in FAMILIES.values()}))
        hub = Row("org/name[@revision]", f"from the Hub, of these families: {names}")
        return [tiny, hub, Row("./directory", "a local Hugging Face checkpoint of those families")]
    return [Row(path.stem, _description(path)) for path in sorted(_folder(kind).glob("*.yaml"))]


def _methods() -> list[Row]:
    """By strategy, in the order in which a recipe applies them."""
    from compressor.registry import STRATEGIES, methods

    headings = {name: f"{name}: {what}" for name, what in STRATEGIES.items()}
    order = [*STRATEGIES, ""]
    found = sorted(methods(), key=lambda method: order.index(method.strategy))
    return [Row(m.name, m.summary, headings.get(m.strategy, "other")) for m in found]


def _engine(engine: Engine) -> str:
    """What an engine loads; `LEGENDS` explains the mark."""
    loads = (
        f"{name}{'*' if limits.evidence == 'run' else ''}: {limits}"
        for name, limits in engine.containers.items()
    )
    caches = f"; caches in {', '.join(sorted(engine.caches))}" if engine.caches else ""
    drafts = f"; drafts: {', '.join(sorted(engine.drafts))}" if engine.drafts else ""
    return f"{engine.title} {engine.version}. {'; '.join(loads)}{caches}{drafts}"


def _loaded_by(container: Container) -> str:
    from compressor.formats.capabilities import ENGINES

    return f"loads in {', '.join(n for n, e in ENGINES.items() if container in e.containers)}"


def _folder(kind: str) -> Path:
    folders = {
        "recipes": resources.recipes(),
        "suites": resources.evals() / "suites",
        "mixes": resources.calibration() / "mixes",
    }
    return folders[kind]


def _description(path: Path) -> str:
    from ruamel.yaml import YAML

    content = YAML(typ="safe").load(path)
    efforts = "".join(f" | {name}" for name in content.get("efforts", {}))
    return str(content.get("description", "")) + (f" [--effort{efforts[2:]}]" if efforts else "")


LEGENDS = {
    "engines": "* our own tests load such files there, and others are by the engine's documents. "
    "dense: ordinary weights; pack-, int- and float-quantized: layouts of compressed-tensors.",
}
"""What the marks in a listing mean, by kind."""


def listing_text(rows: Sequence[Row], kind: str = "") -> str:
    """Names in a column, descriptions wrapped beside them, then what marks mean."""
    if not rows:
        return "none"
    width = max(len(row.name) for row in rows) + 2
    lines: list[str] = []
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += ["", group] if group and lines else [group] if group else []
        lines += [_wrapped(row.name.ljust(width), row.description, width) for row in members]
    if kind in LEGENDS:
        lines += ["", textwrap.fill(LEGENDS[kind], _WIDTH)]
    return "\n".join(lines)


def _wrapped(start: str, text: str, indent: int) -> str:
    return textwrap.fill(text or "-", _WIDTH, initial_indent=start, subsequent_indent=" " * indent)


def shipped_file(name: str) -> Path:
    """The recipe, suite or mix of a name.

    Raises:
        UsageError: nothing of that name ships.
    """
    stem, known = name.removesuffix(".yaml"), _shipped()
    if stem in known:
        return known[stem]
    from difflib import get_close_matches

    near = get_close_matches(stem, known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"nothing called {name!r} ships{guess}", "compress ls recipes")


def json_schema(of: str) -> dict[str, Any]:
    """The JSON Schema of a `recipe` or of a `report`."""
    if of == "report":
        from compressor.report.schema import json_schema as report_json_schema

        return report_json_schema()
    from compressor.recipe import recipe_json_schema

    return recipe_json_schema()


def shipped_names() -> list[str]:
    """What `shipped_file` knows, sorted."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    return {
        path.stem: path
        for kind in ("mixes", "suites", "recipes")  # a recipe wins over its namesakes
        for path in _folder(kind).glob("*.yaml")
    }


def topic_text(topic: Topic) -> str:
    """A method, a section or a key, for reading in a terminal."""
    lines = [f"{topic.name}: {topic.summary}"]
    if topic.source:
        lines.append(f"source: {topic.source}")
    for option in topic.options:
        default = f"; default {option.default}" if option.default else ""
        lines += ["", f"{option.name}  ({option.accepts}{default})"]
        words = (option.what, option.effect, option.source and f"Source: {option.source}.")
        lines.append(textwrap.fill(" ".join(w for w in words if w), _WIDTH, **_INDENT))
    return "\n".join(lines)


_INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


def doctor_text(found: dict[str, Any]) -> str:
    """Everything `compress doctor` found, one fact a line."""
    flat = [(key, value) for key, value in found.items() if not isinstance(value, dict)]
    for section, facts in found.items():
        if isinstance(facts, dict):
            flat += [(f"{section} {key}", value) for key, value in facts.items()]
    return listing_text([Row(key, str(value)) for key, value in flat])
