#!/usr/bin/env python3
"""Chains of stages side by side: KL per domain beside the bits that the linear layers take.

    python benchmarks/chains.py --chain 'W3=[{method: quantize.gptq, bits: 3, group_size: 64}]' \
        --chain 'mixed=[{method: allocate.bits, target_bpw: 3.25, counting: linear},
                        {method: quantize.gptq}]' [--model builtin:tiny] [-o out/chains]

Each chain is a YAML list of stages as in a recipe, calibrated on the default mix and scored on the
suite against the original, fp32 on the CPU. Chains that OUT/chains.jsonl holds are not run again.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from unseen_domains import ACTIVATIONS, Bench, calibration_of

from compressor.calibration import CalibrationSet
from compressor.evaluation.measure import TokenScores
from compressor.model.architecture import Architecture
from compressor.model.load import read_config
from compressor.model.quiet import quiet
from compressor.progress import SilentObserver
from compressor.registry import registry
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.types import StageResult


def stages_of(text: str) -> list[StageConfig]:
    """The stages of a chain written as a YAML list."""
    entries = json.loads(json.dumps(YAML(typ="safe").load(io.StringIO(text))))
    return [
        registry().get(entry["method"]).model_validate_json(json.dumps(entry)) for entry in entries
    ]


def run_chain(
    bench: Bench, name: str, stages: list[StageConfig], calibration: CalibrationSet
) -> dict[str, Any]:
    """KL per domain, bits per linear weight and seconds of one chain."""
    checkpoint, began, result = bench.base, time.perf_counter(), StageResult(bench.base, ())
    notes: dict[str, float] = {}
    for index, stage in enumerate(stages):
        folder, scratch = bench.out / f"checkpoint-{index}", bench.out / "scratch"
        for path in (folder, scratch):
            shutil.rmtree(path, ignore_errors=True)
        result = stage.run(
            checkpoint,
            calibration,
            StageContext(
                folder=folder,
                scratch=scratch,
                device=bench.session.device,
                dtype=bench.session.dtype,
                activation_budget=ACTIVATIONS,
                finished=(),
                block_done=lambda _: None,
                observer=SilentObserver(),
            ),
        )
        notes |= result.notes
        checkpoint = folder
    seconds = time.perf_counter() - began
    bench.session.measure(name, checkpoint)
    scores = TokenScores.load(bench.session.folder / f"{name}.npz")
    kl = {
        domain: float(np.mean(scores.kl[scores.domain == number], dtype=np.float64))
        for number, domain in enumerate(scores.domains)
    }
    architecture = Architecture.from_config(read_config(bench.base))
    sizes = {m.name: m.parameters for m in architecture.matrices}
    spent = sum(m.bits * sizes[m.module] for m in result.metrics)
    bits = spent / sum(sizes[m.module] for m in result.metrics)
    return {"kl": kl, "seconds": seconds, "bits": bits, "notes": notes}


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: a row per chain."""
    domains = sorted(next(iter(cells.values()))["kl"])
    lines = [
        f"| chain | bits | {' | '.join(domains)} | mean | worst | seconds |",
        "|" + "---|" * (len(domains) + 5),
    ]
    for name, cell in cells.items():
        kl = cell["kl"]
        values = " | ".join(f"{kl[domain]:.4f}" for domain in domains)
        mean, worst = sum(kl.values()) / len(kl), max(kl.values())
        row = f"{values} | {mean:.4f} | {worst:.4f} | {cell['seconds']:.0f}"
        lines.append(f"| {name} | {cell['bits']:.3f} | {row} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--chain", action="append", required=True, help="NAME=[STAGE, …] in YAML")
    parser.add_argument(
        "--documents", type=int, help="of each domain; all of the suite's if left out"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/chains"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "chains.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {line["name"]: line for line in map(json.loads, lines)}
    chains = dict(text.split("=", 1) for text in options.chain)
    with quiet():
        bench = Bench(options.model, options.suite, options.out, options.documents)
        size = (options.samples, options.length)
        calibration = calibration_of("default", bench.tokenizer, options.out, size)
        for name, text in chains.items():
            if name not in cells:
                cells[name] = run_chain(bench, name, stages_of(text), calibration)
                with path.open("a") as file:
                    file.write(json.dumps({"name": name} | cells[name]) + "\n")
                print(json.dumps({name: cells[name]["notes"]}), flush=True)
    print("\n".join(table({name: cells[name] for name in chains})))


if __name__ == "__main__":
    main()
