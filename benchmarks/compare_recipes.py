#!/usr/bin/env python3
"""Run recipes on one model and print them side by side: bytes, accuracy, time, memory, FLOPs.

    python benchmarks/compare_recipes.py MODEL recipes/w4-rtn.yaml recipes/w4-gptq.yaml \
        [--set KEY=VALUE]... [-o out/compare] [--results benchmarks/results/NAME.md]

Every recipe runs in a process of its own through the command line, as a user would run it. The
matrix-product rate of the machine is measured in the same minute, so that a stage's operations
can be stated as a share of what the machine can do.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "compressor"]


def gemm_rate() -> float:
    """Operations per second of an fp32 matrix product, best of five."""
    import torch

    matrix, best = torch.randn(2048, 2048), 0.0
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def plan(recipe: str, model: str, overrides: list[str]) -> dict[str, Any]:
    command = [*COMMAND, "plan", recipe, model, "--format", "json", *overrides]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(recipe: str, model: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    subprocess.run([*COMMAND, recipe, model, "-o", str(out), *overrides], check=True)
    return json.loads((out / "report.json").read_text())


def estimate(value: dict[str, Any], digits: int) -> str:
    text = f"{value['value']:.{digits}f}"
    if value["low"] is None:
        return text
    return f"{text} ± {(value['high'] - value['low']) / 2:.{digits}f}"


def kl_of(score: dict[str, Any]) -> str:
    """A domain's KL, and whether the recipe's calibration held no text of its kind."""
    text = f"KL {estimate(score['divergence']['mean'], 4)}"
    return text if score["in_calibration"] is not False else f"{text}, not in calibration"


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def table(reports: dict[str, dict[str, Any]], plans: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table with a column a recipe, after one for the base."""
    first = next(iter(reports.values()))
    base = first["evaluations"]["base"]
    finals = {name: report["variants"][-1] for name, report in reports.items()}
    scores = {name: r["evaluations"][finals[name]["id"]] for name, r in reports.items()}
    stages = {name: variant["stage"] for name, variant in finals.items()}
    size = first["variants"][0]["size"]
    rate = gemm_rate()
    flops = {name: sum(s["flops"] for s in plans[name]["stages"]) for name in reports}
    lines = [
        row("", ["base", *reports]),
        row("---", ["---"] * (1 + len(reports))),
        row("MB on disk", [f"{v['bytes_on_disk'] / 1e6:.1f}" for v in
                           (size, *(f["size"] for f in finals.values()))]),
        row("bits per parameter", [f"{v['bits_checkpoint']:.2f}" for v in
                                   (size, *(f["size"] for f in finals.values()))]),
        row("bits per byte, mean of domains",
            [estimate(base["overall"]["bits_per_byte"], 3),
             *(estimate(s["overall"]["bits_per_byte"], 3) for s in scores.values())]),
        row("mean KL, nats", ["", *(estimate(s["overall"]["divergence"]["mean"], 4)
                                    for s in scores.values())]),
        row("worst domain's KL, nats", ["", *(f"{estimate(w['kl'], 4)} ({w['kl_domain']})"
                                              for w in (s["worst"] for s in scores.values()))]),
        row("99.9 % KL, nats", ["", *(f"{s['overall']['divergence']['p999']:.2f}"
                                      for s in scores.values())]),
        row("same top token", ["", *(f"{s['overall']['divergence']['top1_agreement']['value']:.1%}"
                                     for s in scores.values())]),
    ]  # fmt: skip
    for domain in base["domains"]:
        own = [s["domains"][domain] for s in scores.values()]
        cells = [f"{base['domains'][domain]['perplexity']['value']:.2f}"]
        cells += [f"{s['perplexity']['value']:.2f} ({kl_of(s)})" for s in own]
        lines.append(row(f"perplexity, {domain}", cells))
    lines += [
        row("stage, s", ["", *(f"{s['seconds']:.0f}" for s in stages.values())]),
        row("stage, peak resident MB", ["", *(f"{s['peak_bytes'] / 1e6:.0f}"
                                              for s in stages.values())]),
        row("stage, 10¹² operations", ["", *(f"{flops[name] / 1e12:.1f}" for name in reports)]),
        row(f"share of the fp32 product rate ({rate / 1e9:.0f} GFLOP/s)",
            ["", *(f"{flops[n] / stages[n]['seconds'] / rate:.0%}" for n in reports)]),
        row("whole run, s", ["", *(f"{r['run']['seconds']:.0f}" for r in reports.values())]),
    ]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for every recipe")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/compare"))
    parser.add_argument("--results", type=Path, help="also write the table here")
    options = parser.parse_args()
    overrides = [f"--set={entry}" for entry in options.set]
    names = {Path(recipe).stem: recipe for recipe in options.recipes}
    plans = {name: plan(recipe, options.model, overrides) for name, recipe in names.items()}
    reports = {n: run(r, options.model, options.out / n, overrides) for n, r in names.items()}
    first = next(iter(reports.values()))
    env, protocol = first["env"], next(iter(first["evaluations"].values()))["protocol"]
    arguments = " ".join([Path(options.model).name, *names.values(), *overrides])
    lines = [
        f"`python benchmarks/compare_recipes.py {arguments}` at commit `{env['commit']}`",
        "",
        f"{env['hardware']['cores']} cores ({env['hardware']['cpu']}), torch {env['torch']}, "
        f"Python {platform.python_version()}; protocol `{protocol['id']}`, windows of "
        f"{protocol['length']}, suite `{protocol['suite']}`, text {protocol['text_sha256'][:12]}.",
        "± is half the 95 % interval.",
        "",
        *table(reports, plans),
    ]
    print("\n".join(lines))
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
