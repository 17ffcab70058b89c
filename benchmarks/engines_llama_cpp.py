#!/usr/bin/env python3
"""GGUF files in llama.cpp: bytes, tokens per second, perplexity, KL to the original.

    python benchmarks/engines_llama_cpp.py MODEL [-o FOLDER] [--samples N] [--length N]
                                           [--bytes N] [--threads N]

Files: F16 of the original; Q8_0 and Q4_0 of our codes (round to nearest; GPTQ, groups of 32); Q4_0
and Q4_K_M of llama.cpp's own quantizer with our importance matrix. All are calibrated on the same
text. Perplexity and KL are those of `llama-perplexity --kl-divergence` against the F16 file, on
prose of the evaluation split; beside them stands our own KL of the same weights on the same text.
Speeds are of `llama-bench`, by the processor time that it takes and not by the clock, so that other
work on the machine counts less. What is done is kept in FOLDER and not done again.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Bench, Kept, parameters, stage

from compressor.formats import gguf, llama_quantize
from compressor.formats.atomic import replacing
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.formats.imatrix import write_imatrix
from compressor.importance import measure_importance
from compressor.progress import SilentObserver
from compressor.reload import unpack
from compressor.text import evaluation_documents

LENGTH = 512
ROWS = ("F16", "Q8_0", "Q4_0", "Q4_0, llama-quantize", "Q4_K_M, llama-quantize")
OURS: dict[str, dict[str, Any]] = {
    "Q8_0": {"method": "quantize.rtn", "bits": 8, "group_size": 32},
    "Q4_0": {
        "method": "quantize.gptq",
        "bits": 4,
        "group_size": 32,
        "symmetry": "full_range",
        "propagate": 0.0,
        "sweeps": 0,
    },
}


@dataclass(frozen=True)
class Files:
    """Everything that the rows are made of.

    Attributes:
        bench: the model, and our KL.
        folder: of the files.
        text: that is scored.
        samples, length: of calibration.
        threads: of llama.cpp.
    """

    bench: Bench
    folder: Path
    text: Path
    samples: int
    length: int
    threads: int

    def make(self, row: str) -> tuple[Path, Path]:
        """The file of a row, and a dense checkpoint of its weights."""
        name = row.replace(", ", "-")
        out, dense = self.folder / name, self.folder / f"{name}-dense"
        if row == "F16":
            if not (out / gguf.FILE).is_file():
                with replacing(out / gguf.FILE) as temporary:
                    self.tool("quantize", self.original(), temporary, "F16", self.threads)
            return out / gguf.FILE, self.bench.base
        if row in OURS:
            calibration = self.bench.calibration("default", self.samples, self.length)
            ran = self.bench.run([stage(OURS[row])], calibration)
            codes = CodesReader(ran.checkpoint)
            gguf.write(Source(ran.checkpoint, codes, parameters(self.bench.base), "gguf"), out)
            return out / gguf.FILE, ran.checkpoint
        kind = row.partition(",")[0]
        llama_quantize.quantize(
            llama_quantize.require_program(),
            self.original(),
            out / gguf.FILE,
            kind,  # type: ignore[arg-type]
            importance=self.importance(),
            threads=self.threads,
        )
        unpack(out, self.bench.base, dense, parameters(self.bench.base))
        return out / gguf.FILE, dense

    def original(self) -> Path:
        """The dense file."""
        if not (self.folder / gguf.FILE).is_file():
            source = Source(self.bench.base, {}, parameters(self.bench.base), "llama-quantize")
            gguf.write(source, self.folder)
        return self.folder / gguf.FILE

    def importance(self) -> Path:
        """The importance matrix, of the calibration text."""
        path = self.folder / "imatrix.gguf"
        if not path.is_file():
            calibration = self.bench.calibration("default", self.samples, self.length)
            found = measure_importance(self.bench.base, calibration.batches, SilentObserver())
            write_imatrix(path, found, dataset="mix default", chunk=self.length)
        return path

    def tool(self, name: str, *arguments: object, says: str = "") -> str:
        """What one of llama.cpp's tools says; some end before all of it is written, and run again.

        Args:
            name: without `llama-`.
            arguments: of the command line.
            says: the last of what is needed.
        """
        program = llama_quantize.require_program().with_name(f"llama-{name}")
        line = [str(program), *map(str, arguments)]
        for _ in range(20):
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(line)}\n{(done.stdout + done.stderr)[-2000:]}")
            if says in done.stdout + done.stderr:
                return done.stdout + done.stderr
        raise SystemExit(f"llama-{name} never says {says!r}")

    def measure(self, row: str) -> dict[str, Any]:
        """Bytes, speeds, perplexity and KL of one row."""
        file, dense = self.make(row)
        ours = 0.0 if dense == self.bench.base else self.bench.kl(row, dense)["prose"]
        quality, speed = self.quality(file), self.speed(file)
        return {"bytes": file.stat().st_size, "ours": ours, **quality, **speed}

    def quality(self, file: Path) -> dict[str, float]:
        """Perplexity and mean KL to the F16 file."""
        common = ("-f", self.text, "-c", LENGTH, "-b", LENGTH, "-t", self.threads)
        logits = self.folder / "logits"
        if not logits.is_file():
            original = self.make("F16")[0]
            with replacing(logits) as temporary:
                base = ("--kl-divergence-base", temporary)
                self.tool("perplexity", "-m", original, *common, *base)
        options = (*common, "--kl-divergence-base", logits, "--kl-divergence")
        said = self.tool("perplexity", "-m", file, *options, says="Minimum KLD")
        return {"perplexity": number(r"PPL\(Q\)", said), "kl": number("KLD", said)}

    def speed(self, file: Path) -> dict[str, float]:
        """Tokens per second of processor time, reading and writing."""
        tests = {"reading": ("-p", 128, "-n", 0), "writing": ("-p", 0, "-n", 16)}
        return {name: self.rate(file, *options) for name, options in tests.items()}

    def rate(self, file: Path, *options: object) -> float:
        """From the time that four more repetitions take, so that loading does not count."""
        spent = {}
        for repeats in (1, 5):
            began = _processor_seconds()
            self.tool("bench", "-m", file, *options, "-r", repeats, "-t", self.threads)
            spent[repeats] = _processor_seconds() - began
        tokens = sum(number for number in options if isinstance(number, int))
        return 4 * tokens / (spent[5] - spent[1])


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def number(pattern: str, said: str) -> float:
    """A mean that llama-perplexity printed."""
    found = re.search(rf"Mean\s+{pattern}\s*:\s*(-?[\d.]+)", said)
    if found is None:
        raise SystemExit(f"no {pattern} in:\n{said[-2000:]}")
    return float(found[1])


def table(get: Callable[[str], dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| file | MB | read, tokens/s | written, tokens/s | perplexity | KL, nats | KL by us |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        found = get(row)
        speeds = f"{found['reading']:.1f} | {found['writing']:.1f}"
        quality = f"{found['perplexity']:.3f} | {found['kl']:.4f} | {found['ours']:.4f}"
        lines.append(f"| {row} | {found['bytes'] / 1e6:.1f} | {speeds} | {quality} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/llama-cpp"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of one")
    parser.add_argument("--bytes", type=int, default=24_000, help="of text that is scored")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = out / "prose.txt"
    documents = [document.text for document in evaluation_documents("prose")]
    text.write_text("\n\n".join(documents)[: arguments.bytes], encoding="utf-8")
    bench = Bench(
        arguments.model, out, text={"prose": str(text)}, protocol="llama.cpp", length=LENGTH
    )
    files = Files(bench, out / "gguf", text, arguments.samples, arguments.length, arguments.threads)
    kept = Kept(out / "cells.jsonl")
    rows = {row: kept.get(row, files.measure, row) for row in ROWS}
    print(table(rows.__getitem__))


if __name__ == "__main__":
    main()
