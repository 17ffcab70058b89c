#!/usr/bin/env python3
"""What calibration on one kind of text does to the others: KL per domain, cell by cell.

    python benchmarks/unseen_domains.py --bits 4,3 --calibrate default,prose,code \
        --stage rtn:grid=mse --stage gptq:damping=0.1,propagate=0.5 [--suite quick]
        [--model builtin:tiny] [-o out/unseen]

Every stage runs once per width and calibration text (a shipped mix or one domain), groups of 64,
fp32 on the CPU, and is scored on the suite against the original. Cells that OUT/cells.jsonl holds
already are not run again. The table has the mean over domains and the worst ratio of a domain's
KL to that of the first stage of the same width, which should be rounding to nearest. A stage that
reads no text runs once per width.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import Bench, Kept, stage

from compressor.calibration import CalibrationSet
from compressor.model.quiet import quiet
from compressor.stages.base import StageConfig


def stage_of(text: str, bits: int) -> StageConfig:
    """`gptq:damping=0.1` at a width."""
    name, _, rest = text.partition(":")
    options = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
    return stage({"method": f"quantize.{name}", "bits": bits, "group_size": 64} | options)


def cell(bench: Bench, key: str, rounder: StageConfig, text: CalibrationSet) -> dict[str, Any]:
    """Mean KL per domain, and seconds of the stage."""
    ran = bench.run([rounder], text)
    return {"kl": bench.kl(key, ran.checkpoint), "seconds": ran.seconds}


def key_of(written: str, text: str, bits: int) -> str:
    """Of a cell; calibration text that a stage does not read is no part of it."""
    reads = stage_of(written, bits).calibration_need() is not None
    return f"{written}/{text if reads else 'no text'}/{bits}"


def table(cells: dict[str, dict[str, Any]], keys: list[tuple[str, str, int]]) -> list[str]:
    """Markdown: a row per stage, width and calibration text."""
    domains = sorted(next(iter(cells.values()))["kl"])
    first = keys[0][0]
    lines = [
        f"| W | stage | calibrated on | {' | '.join(domains)} | mean | worst / {first} |",
        "|" + "---|" * (len(domains) + 5),
    ]
    for rounder, text, bits in keys:
        kl = cells[key_of(rounder, text, bits)]["kl"]
        simple = cells[key_of(first, text, bits)]["kl"]
        worst = max(kl[domain] / simple[domain] for domain in domains)
        values = " | ".join(f"{kl[domain]:.4f}" for domain in domains)
        mean = sum(kl.values()) / len(kl)
        lines.append(f"| {bits} | {rounder} | {text} | {values} | {mean:.4f} | {worst:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--suite", default="quick")
    parser.add_argument(
        "--documents", type=int, help="of each domain; all of the suite's if left out"
    )
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--calibrate", default="default,prose,code")
    parser.add_argument("--stage", action="append", required=True, help="method:option=value,…")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/unseen"))
    options = parser.parse_args()
    texts, widths = options.calibrate.split(","), [int(bits) for bits in options.bits.split(",")]
    keys = [(s, text, bits) for bits in widths for text in texts for s in options.stage]
    with quiet():
        bench = Bench(options.model, options.out, suite=options.suite, documents=options.documents)
        kept, cells = Kept(options.out / "cells.jsonl"), {}
        sets = {t: bench.calibration(t, options.samples, options.length) for t in texts}
        for written, text, bits in keys:
            key, rounder = key_of(written, text, bits), stage_of(written, bits)
            cells[key] = kept.get(key, cell, bench, key, rounder, sets[text])
    print("\n".join(table(cells, keys)))


if __name__ == "__main__":
    main()
