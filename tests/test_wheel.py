"""What a user installs: the wheel, in an environment that knows nothing of this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from compressor import __version__

ROOT = Path(__file__).resolve().parents[1]
DATA = "compressor/data"
SMALL = (
    "calibration.samples=4",
    "calibration.length=64",
    "evaluate.documents=1",
    "evaluate.length=64",
    "evaluate.resamples=100",
    "evaluate.noise_floor=false",
)
FACTS = """
import importlib.metadata, json, sys
import compressor, torch
from compressor import resources
from compressor.recipe import shipped_recipes
places = (resources.recipes(), resources.calibration(), resources.evals())
print(json.dumps({
    "package": compressor.__file__,
    "data": [str(place) for place in (*places, resources.builtin_model("tiny"))],
    "recipes": list(shipped_recipes()),
    "version": importlib.metadata.version("compressor"),
    "torch": torch.__file__,
    "checkout on the path": [entry for entry in sys.path if entry == sys.argv[1]],
}))
"""


def execute(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, away from the checkout's settings."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    execute(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, ROOT, cwd=out.parent
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; only its dependencies are borrowed from this one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True)
    interpreter = home / "bin" / "python"
    execute(
        *(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet"),
        *("--no-deps", "--no-index", wheel),
        cwd=home,
    )
    (site,) = home.glob("lib/python*/site-packages")
    # A folder named in a .pth comes last on the path, and .pth files inside it are not read: the
    # editable install of this checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return interpreter


def tracked(*folders: str) -> set[str]:
    """Files of the checkout that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = execute(*command, cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {f"{DATA}/{name}" for name in tracked("recipes", "calibration", "evals")}
    scripts = ("README.md", "build_text.py", "archives.py", "cleaning.py")
    tools = {f"{DATA}/calibration/{name}" for name in scripts}
    meta = {name for name in names if ".dist-info/" in name}
    assert names - meta == tracked("compressor") | (data - tools)
    for needed in (
        "compressor/py.typed",
        "compressor/builtin/tiny/model.safetensors",
        "compressor/builtin/tiny/tokenizer.json",
        "compressor/report/report.schema.json",
        "compressor/report/templates/report.html.j2",
        f"{DATA}/recipes/quickstart.yaml",
        f"{DATA}/recipes/schema.json",
        f"{DATA}/calibration/manifest.json",
        f"{DATA}/calibration/LICENSES.md",
        f"{DATA}/calibration/mixes/default.yaml",
        f"{DATA}/calibration/text/prose/calibration-00000.jsonl",
        f"{DATA}/evals/manifest.json",
        f"{DATA}/evals/suites/quick.yaml",
        f"{DATA}/evals/text/code/evaluation-00000.jsonl",
    ):
        assert needed in names
    parts = {part for name in names for part in name.split("/")}
    assert not {"tests", "conftest.py", "__pycache__", ".git"} & parts
    assert not [part for part in parts if part.startswith("test_") or part.endswith(".pyc")]
    assert wheel.stat().st_size < 30e6


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "compress = compressor.cli:main" in points


def test_it_runs_where_the_checkout_is_not(python: Path, tmp_path: Path) -> None:
    facts = json.loads(execute(python, "-c", FACTS, str(ROOT), cwd=tmp_path))
    home = str(python.parents[1])
    for place in (facts["package"], *facts["data"]):
        assert place.startswith(home)
    assert f"/{DATA}/" in facts["data"][0]
    assert facts["version"] == __version__
    assert facts["checkout on the path"] == []
    assert set(facts["recipes"]) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert not facts["torch"].startswith(home)

    command = python.parent / "compress"
    options = [word for entry in SMALL for word in ("--set", entry)]
    out = execute(
        *(command, "quickstart", "builtin:tiny", "-o", "out", "-q", "--format", "json"),
        *options,
        cwd=tmp_path,
    )
    assert json.loads(out)["verdict"] == "PASS"
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["env"]["package"] == __version__
    assert report["env"]["commit"] is None
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "deliverable" / "compressed-tensors" / "config.json").is_file()
    # Modules run as `python -m compressor`, too.
    assert execute(python, "-m", "compressor", "version", cwd=tmp_path).strip() == __version__
