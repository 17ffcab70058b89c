"""Imports go one way: errors, types <- numerics <- model, formats <- stages <- engine <- cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "compressor"

GROUND = {"errors", "types", "resources", "progress", "machine", "source", "interrupts", ""}
GROUND |= {"efforts", "paths", "programs", "disk", "diagnose", "section"}
ALGORITHMS = {"numerics"}
WEIGHTS = {"model", "formats"}
# Text, measuring and reporting stand beside the stages, with what describes stages to a reader.
BESIDE = {
    "text",
    "text_sources",
    "calibration",
    "evaluation",
    "report",
    "hub",
    "licences",
    "reload",
    "provenance",
    "meter",
}
BESIDE |= {"provenance", "meter", "stages", "order", "registry", "decoding", "training", "team"}
ENGINE = {"recipe", "explain", "cost", "plan", "journal", "verify", "variants"}
ENGINE |= {
    "claim",
    "facts",
    "importance",
    "publish",
    "recheck",
    "serving",
    "sessions",
    "compare",
    "engine",
    "pipeline",
    "doctor",
    "drafts",
    "state",
    "chain",
    "deliverables",
    "following",
    "requantize",
    "export_checks",
    "original",
    "premises",
    "pricing",
    "sections",
}
TOP = {
    "console",
    "commands",
    "cli",
    "__main__",
    "facade",
}  # facade: what `compressor` itself offers

LAYERS = (GROUND, ALGORITHMS, WEIGHTS, BESIDE, ENGINE, TOP)
NEVER = {("model", "formats"), ("formats", "model"), ("evaluation", "stages")}
NEVER |= {("evaluation", "report"), ("calibration", "stages"), ("report", "stages")}
# A draft is decoded with, and trained, by whoever has a target; stages are only one such.
NEVER |= {("decoding", name) for name in ("stages", "report", "training", "evaluation")}
NEVER |= {("training", name) for name in ("stages", "report", "evaluation")}

# What the command line reads before it knows whether it will need torch.
LIGHT = ("cli", "commands/options", "commands/running", "commands/measuring")
LIGHT += (
    "commands/looking",
    "console",
    "errors",
    "types",
    "resources",
    "registry",
    "recipe",
    "source",
)
LIGHT += ("diagnose", "order", "plan", "cost", "explain", "progress", "machine", "calibration")
LIGHT += ("commands/serving", "programs", "export_checks", "pricing", "sections", "premises")
LIGHT += ("section",)
LIGHT += ("model/matrices", "model/serving", "model/configuration")
LIGHT += ("interrupts", "text", "model/architecture", "model/families", "evaluation/config")
LIGHT += ("evaluation/gates", "evaluation/results", "evaluation/suites", "formats/sizes")
LIGHT += ("formats/support", "report/schema", "efforts", "paths", "team")
HEAVY = {"torch", "transformers", "datasets", "accelerate", "compressed_tensors", "scipy"}


def imports(source: str, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names of modules that a source imports when it runs."""
    tree = ast.parse(source)
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The first name below the package, or None for another package."""
    names = module.split(".")
    if names[0] != "compressor":
        return None
    name = names[1] if len(names) > 1 else ""
    is_module = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    if name and not is_module:
        return "" if name == "__version__" else "facade"
    return name


def level(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def violations(owner: str, source: str) -> list[str]:
    """Imports of a module of part `owner` that go up, or to a part that it must not know."""
    found = []
    for module in imports(source):
        target = part(module)
        if target is None or target == owner:
            continue
        if level(target) > level(owner) or (owner, target) in NEVER:
            found.append(f"{owner} imports {module}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield ("facade" if first == "__init__" else first), path


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {owner for owner, _ in modules() if owner != "builtin"} <= known


def test_imports_go_one_way() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {violation}"
        for owner, path in modules()
        if owner != "builtin"
        for violation in violations(owner, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_numerics_knows_torch_and_types_only() -> None:
    allowed = {"compressor.types", "compressor.numerics", "compressor.errors"}
    for path in (PACKAGE / "numerics").glob("*.py"):
        for module in imports(path.read_text(encoding="utf-8")):
            inside = ".".join(module.split(".")[:2])
            assert not module.startswith("compressor") or inside in allowed, (path.name, module)
            assert module.split(".")[0] not in {"pathlib", "logging", "transformers", "pydantic"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    roots = {module.split(".")[0] for module in imports(source, top_only=True)}
    assert not roots & HEAVY


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda p: p.stem)
def test_stages_import_torch_when_they_run(path: Path) -> None:
    if path.stem in {"base", "quantize_base"} or path.stem.startswith(("quantize_", "draft_")):
        roots = {m.split(".")[0] for m in imports(path.read_text("utf-8"), top_only=True)}
        assert not roots & HEAVY


def test_nothing_reads_pickles_or_runs_strings() -> None:
    for _, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {module.split(".")[0] for module in imports(path.read_text(encoding="utf-8"))}
        assert not names & {"pickle", "dill", "joblib", "shelve"}, path
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, path


def test_what_a_recipe_says_is_strict_by_one_class() -> None:
    strict = [path.stem for _, path in modules() if "allow_inf_nan=False" in path.read_text()]
    assert strict == ["section"]


@pytest.mark.parametrize(
    ("owner", "line"),
    [
        ("numerics", "from compressor.stages.base import StageConfig"),
        ("model", "from compressor.formats import sizes"),
        ("formats", "import compressor.model.architecture"),
        ("stages", "from compressor import engine"),
        ("evaluation", "from compressor.stages import base"),
        ("types", "from compressor.numerics import rtn"),
        ("engine", "from compressor.cli import main"),
        ("stages", "from compressor import Pipeline"),
        ("engine", "def late():\n    from compressor.cli import main"),
    ],
)
def test_a_bad_import_is_caught(owner: str, line: str) -> None:
    assert violations(owner, line)


@pytest.mark.parametrize(
    ("owner", "line"),
    [
        ("stages", "from compressor.numerics import rtn"),
        ("numerics", "from compressor.types import QTensor"),
        ("cli", "from compressor import __version__"),
        ("model", "if TYPE_CHECKING:\n    from compressor.formats import sizes"),
        ("formats", "import torch"),
    ],
)
def test_a_good_import_passes(owner: str, line: str) -> None:
    assert not violations(owner, line)
