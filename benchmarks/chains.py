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
from pathlib import Path
from typing import Any

from bench import Bench, Kept, kl_row, stage
from ruamel.yaml import YAML

from compressor.calibration import CalibrationSet
from compressor.model.architecture import Architecture
from compressor.model.load import read_config
from compressor.model.quiet import quiet


def run_chain(bench: Bench, name: str, text: str, calibration: CalibrationSet) -> dict[str, Any]:
    """KL per domain, bits per linear weight and seconds of a chain written as a YAML list."""
    stages = [stage(entry) for entry in YAML(typ="safe").load(io.StringIO(text))]
    ran = bench.run(stages, calibration)
    architecture = Architecture.from_config(read_config(bench.base))
    sizes = {m.name: m.parameters for m in architecture.matrices}
    metrics = ran.results[-1].metrics
    spent = sum(m.bits * sizes[m.module] for m in metrics)
    return {
        "kl": bench.kl(name, ran.checkpoint),
        "seconds": ran.seconds,
        "bits": spent / sum(sizes[m.module] for m in metrics),
        "notes": {key: value for result in ran.results for key, value in result.notes.items()},
    }


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: a row per chain."""
    domains = sorted(next(iter(cells.values()))["kl"])
    lines = [
        f"| chain | bits | {' | '.join(domains)} | mean | worst | seconds |",
        "|" + "---|" * (len(domains) + 5),
    ]
    lines += [
        f"| {name} | {cell['bits']:.3f} | {kl_row(cell['kl'])} | {cell['seconds']:.0f} |"
        for name, cell in cells.items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--chain", action="append", required=True, help="NAME=[STAGE, …] in YAML")
    parser.add_argument(
        "--documents", type=int, help="of each domain; all of the suite's if left out"
    )
    parser.add_argument("--mix", default="default", help="a shipped mix, or one domain")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/chains"))
    options = parser.parse_args()
    with quiet():
        bench = Bench(options.model, options.out, suite=options.suite, documents=options.documents)
        kept, cells = Kept(options.out / "chains.jsonl"), {}
        calibration = bench.calibration(options.mix, options.samples, options.length)
        for name, text in (chain.split("=", 1) for chain in options.chain):
            cells[name] = kept.get(name, run_chain, bench, name, text, calibration)
            print(json.dumps({name: cells[name]["notes"]}), flush=True)
    print("\n".join(table(cells)))


if __name__ == "__main__":
    main()
