#!/usr/bin/env python3
"""Finished runs side by side, stage by stage: bytes, KL to the original by domain, time.

    compress recipes/prune-recover-w4.yaml MODEL -o out/static
    compress recipes/prune-recover-w4.yaml MODEL -o out/dro --set stages.1.sampler=dro
    python benchmarks/stage_costs.py out/static out/dro [--results FILE.md]

The runs must have evaluated the same text (`evaluate.every_stage: true` for all stages). The last
columns compare what a run ends with to what the first run ends with: the change of the mean and of
the worst domain's KL, with 95 % intervals from documents that are resampled for both together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import kl_row, nearer, percent

from compressor.evaluation.measure import TokenScores


def result(run: Path, report: dict[str, Any]) -> TokenScores:
    """Every token's scores of what a run ends with."""
    return TokenScores.load(run / "evaluations" / f"{report['variants'][-1]['id']}.npz")


def rows(run: Path, report: dict[str, Any], beside: str) -> list[str]:
    """A Markdown row for every variant that was measured, the original left out.

    Args:
        run: its folder.
        report: what it says.
        beside: the cells that compare what it ends with.
    """
    found = []
    for variant in report["variants"][1:]:
        evaluation = report["evaluations"].get(variant["id"])
        if evaluation is None:
            continue
        kl = {name: s["divergence"]["mean"]["value"] for name, s in evaluation["domains"].items()}
        stage, updates = variant["stage"], variant["stage"]["notes"].get("updates")
        found.append(
            f"| {run.name}: {stage['method']} | {variant['size']['bytes_on_disk'] / 1e6:.1f} "
            f"| {kl_row(kl)} | {beside if variant is report['variants'][-1] else '– | –'} "
            f"| {'–' if updates is None else round(updates)} | {stage['seconds']:.0f} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    reports = [json.loads((run / "report.json").read_text()) for run in options.runs]
    results = [result(*pair) for pair in zip(options.runs, reports, strict=True)]
    against = [" | ".join(map(percent, nearer(results[0], r).values())) for r in results[1:]]
    domains = sorted(reports[0]["evaluations"]["base"]["domains"])
    lines = [
        f"| run: after | MB | {' | '.join(domains)} | mean | worst | mean beside the first run "
        "| worst beside the first run | updates | seconds |",
        "|" + "---|" * (len(domains) + 8),
    ]
    for run, report, beside in zip(options.runs, reports, ["– | –", *against], strict=True):
        lines += rows(run, report, beside)
    print("\n".join(lines))
    if options.results:
        options.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
