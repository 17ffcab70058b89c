#!/usr/bin/env python3
"""Ours beside the peers: same model, same calibration tokens, same held-out text, same code.

    python benchmarks/peers/environments.py                     # once; a few GB below cache/peers
    python benchmarks/peers/side_by_side.py --bits 4 --mix default --results benchmarks/results

One command per table: a width and a calibration text. Every cell is a process of its own that
loads the model, rounds it and saves it; a JSON file per cell records what it cost, so the command
resumes. What was saved is then loaded again and scored here, against the original. `--retime`
runs the cells once more for their cost (and scores again what came out different): use it on a
quiet machine, the load average in each record says whether it was. `--only` takes patterns of
names (`compressor-*,*-gptq`); `--nice 10` gives way to other work, `--threads 1` leaves it a core.
Rows that the folder of `--results` holds from earlier days stay in the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import environments
import meter
import tables
import torch
from dense import write_dense
from methods import METHODS, OURS, Method, Task
from tokens import write_tokens

from compressor.calibration import load_mix
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.session import BASE
from compressor.formats.atomic import atomic_write_json
from compressor.model.load import read_config
from compressor.model.quiet import quiet
from compressor.progress import SilentObserver
from compressor.provenance import Environment, environment
from compressor.sessions import open_session

REPOSITORY = environments.HERE.parents[1]
MODEL = REPOSITORY / "cache" / "SmolLM2-135M-Instruct"
PACKED_INTEGERS = {"gptq", "auto-round"}  # `quant_method` of what `dense` reads


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def digest(folder: Path) -> str:
    """Of all tensors of a checkpoint."""
    found = hashlib.sha256()
    for path in weights_of(folder):
        found.update(path.read_bytes())
    return found.hexdigest()


def portable(command: Sequence[str]) -> str:
    """A command without the paths of this machine."""
    replaced = [part.replace(str(REPOSITORY.resolve()), ".").replace(str(REPOSITORY), ".")
                for part in command]  # fmt: skip
    interpreter = "python" if command[0] == sys.executable else replaced[0]
    return " ".join([interpreter, *replaced[1:]])


def versions(python: str) -> dict[str, str]:
    """torch, transformers and compressed-tensors of an interpreter."""
    script = (
        "import json, importlib.metadata as m\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: names[n] for n in ('torch', 'transformers', 'compressed-tensors')"
        " if n in names}))"
    )
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def processor(found: Environment, threads: int) -> str:
    """What seconds were measured on."""
    return f"{found.hardware.cpu}, {threads} of {found.hardware.cores} cores"


class Bench:
    """One model, one suite, one folder of cells."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = options.model.absolute()
        self.out = options.out.absolute() / self.model.name
        self.config = EvaluateConfig(
            suite=options.suite, dtype=options.dtype, documents=options.documents, noise_floor=False
        )
        size = f"-{options.documents}" if options.documents else ""
        self.session = open_session(
            self.model,
            self.config,
            folder=self.out / f"scores-{options.suite}{size}-{options.dtype}",
            cache=self.out / "base",
            observer=SilentObserver(),
        )

    @property
    def calibration(self) -> str:
        """Of the text that all calibrate on: mix, rows, tokens a row."""
        return f"{self.options.mix}-{self.options.samples}x{self.options.length}"

    @property
    def page(self) -> str:
        """Name of the table: the model goes without saying unless it is another one."""
        other = "" if self.model.name == MODEL.name else f"{self.model.name}-"
        return f"peers-{other}w{self.options.bits}-{self.calibration}"

    @property
    def tokens(self) -> Path:
        """The file all sides calibrate on."""
        path, options = self.out / f"tokens-{self.calibration}.safetensors", self.options
        if not path.is_file():
            write_tokens(self.model, options.mix, options.samples, options.length, path)
        return path

    def key(self, method: Method) -> tuple[str, str, str]:
        """Calibration, width, method."""
        used = self.calibration if method.calibrated else "none"
        return used, f"w{self.options.bits}", method.id

    def folder(self, method: Method) -> Path:
        """Where a cell is kept."""
        return self.out.joinpath(*self.key(method))

    def name(self, method: Method) -> str:
        """Of a cell's scores."""
        return "~".join(self.key(method))

    def cell(self, method: Method) -> dict[str, Any]:
        """Cost and scores of one cell; computed unless they are on disk."""
        folder, name = self.folder(method), self.name(method)
        if self.options.retime or not (folder / "run.json").is_file():
            self._run(method, folder)
        found: dict[str, Any] = json.loads((folder / "run.json").read_text())
        scored = self.session.folder / f"{name}.json"
        stale = not scored.is_file() or found["sha256"] != self._scored(name)
        if stale and not self.options.no_scores:
            self._score(name, folder / "checkpoint" / method.saved)
            (self.session.folder / f"{name}.sha256").write_text(found["sha256"])
        if scored.is_file():
            found["evaluation"] = self.session.load(name)
            found["documents"] = tables.by_document(self.session.scores(name))
        return found

    def _scored(self, name: str) -> str:
        path = self.session.folder / f"{name}.sha256"
        return path.read_text() if path.is_file() else ""

    def _run(self, method: Method, folder: Path) -> None:
        checkpoint, options = folder / "checkpoint", self.options
        shutil.rmtree(checkpoint, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        size = (options.samples, options.length)
        task = Task(self.model, self.tokens, options.mix, *size, options.bits, checkpoint)
        command = method.command(task)
        cost = meter.run(
            command,
            REPOSITORY if method.is_ours else folder,
            folder / "log.txt",
            {"OMP_NUM_THREADS": str(options.threads),
             "HF_HUB_OFFLINE": "1", **dict(method.environment)},
            options.nice,
        )  # fmt: skip
        saved, here = checkpoint / method.saved, environment(torch.device("cpu"))
        facts = {
            "peer": method.peer,
            "method": method.name,
            "bits": options.bits,
            "calibration": self.calibration if method.calibrated else None,
            "command": portable(command),
            "versions": versions(command[0]),
            "toolkit": environments.PEERS.get(method.peer, OURS),
            "commit": here.commit,
            "processor": processor(here, options.threads),
            "cost": asdict(cost),
            "bytes": sum(path.stat().st_size for path in weights_of(saved)),
            "bytes_16": tables.bytes_at_16(weights_of(saved)),
            "sha256": digest(saved),
        }
        atomic_write_json(folder / "run.json", facts)

    def _score(self, name: str, packed: Path) -> None:
        """Load what was saved, and measure it."""
        if not (self.session.folder / f"{BASE}.npz").is_file():
            self.session.measure(BASE, self.model)
        method = read_config(packed)["quantization_config"]["quant_method"]
        if method not in PACKED_INTEGERS:
            self.session.measure(name, packed)
            return
        with TemporaryDirectory(dir=self.out) as dense:  # another call may score beside this one
            write_dense(packed, self.model, Path(dense))
            self.session.measure(name, Path(dense))


def chosen(only: str | None) -> list[Method]:
    """Methods whose name matches one of the comma-separated patterns."""
    patterns = only.split(",") if only else ["*"]
    return [m for m in METHODS if any(fnmatch(m.id, pattern) for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=MODEL, type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--mix", default="default", help="calibration/mixes, by name")
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--only", help="patterns of names, comma-separated")
    parser.add_argument("--known", action="store_true", help="only cells that are on disk")
    parser.add_argument("--retime", action="store_true", help="measure the cost again")
    parser.add_argument("--no-scores", action="store_true", help="leave scoring to a later call")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--documents", type=int, help="per domain, in place of the suite's")
    parser.add_argument("--dtype", default="float32", help="of scoring")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("-o", "--out", type=Path, default=REPOSITORY / "cache" / "peers" / "cells")
    parser.add_argument("--results", type=Path, help="folder for the table and its JSON")
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    torch.set_num_threads(options.threads)
    with quiet():
        bench = Bench(options)
        cells = {}
        for method in chosen(options.only):
            if not options.known or (bench.folder(method) / "run.json").is_file():
                cells[method.id] = bench.cell(method)
    cells = {name: cell for name, cell in cells.items() if "evaluation" in cell}
    base = bench.session.load(BASE)
    if options.results:
        earlier = tables.read(options.results / f"{bench.page}.json", base.protocol)
        known = earlier | cells
        cells = {method.id: known[method.id] for method in METHODS if method.id in known}
    tables.paired(cells)
    command = portable([sys.executable, *sys.argv])
    calibrated = load_mix(options.mix).domains
    lines = tables.page(cells, base, bench.model.name, command, bench.calibration, calibrated)
    print("\n".join(lines))
    if options.results:
        tables.write(options.results, bench.page, lines, cells)


if __name__ == "__main__":
    main()
