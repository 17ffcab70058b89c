#!/usr/bin/env python3
"""Pruning methods side by side: KL to the original per domain, same calibration text for all.

    python benchmarks/prune_methods.py --model cache/SmolLM2-135M-Instruct \
        --stage depth:layers=23,score=influence --stage width:ratio=0.2,score=wanda \
        --stage width:ratio=0.2,score=flap@biased --stage obs:ratio=0.2 \
        [-o out/prune] [--results benchmarks/results/NAME.md]

`--stage` is a method of the family `prune` with its options; several in a row are joined by `+`.
With `@biased` the stage starts from a copy of the model with biases of zero in attention and
feed-forward halves (Llama's `attention_bias`, `mlp_bias`), which computes the same: FLAP puts into
them what the removed channels put out on average, as published. Everything is fp32 on the CPU; rows
that OUT/rows.jsonl holds already are not run again. Domains are those of the suite; what the
calibration mix does not hold is marked by `*`. The last columns say how much nearer to the original
a row is than the first one, in percent of its mean and worst KL, with 95 % intervals from documents
that are resampled for both together.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Kept, kl_row, origin, parameters, percent, stage
from safetensors.torch import save_file

from compressor.calibration import CalibrationSet
from compressor.formats.files import copy_parent_files
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.quiet import quiet
from compressor.stages.base import StageConfig


def stages_of(text: str) -> list[StageConfig]:
    """`depth:layers=28+obs:ratio=0.1` as configured stages; a list stands in brackets."""
    found = []
    for part in text.removesuffix("@biased").split("+"):
        name, _, rest = part.partition(":")
        pairs = (pair.split("=", 1) for pair in rest.split(",") if pair)
        options = {key: json.loads(value) if value[0] == "[" else value for key, value in pairs}
        found.append(stage({"method": f"prune.{name}"} | options))
    return found


def biased(base: Path, folder: Path) -> Path:
    """The same function with zero biases that a method may fill."""
    config = {**read_config(base), "attention_bias": True, "mlp_bias": True}
    reader = CheckpointReader(base)
    tensors = {name: reader[name] for name in reader}
    dtype = next(iter(tensors.values())).dtype
    for name, shape in Architecture.from_config(config).tensors():
        tensors.setdefault(name, torch.zeros(shape, dtype=dtype))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    copy_parent_files(base, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def row(bench: Bench, text: str, calibration: CalibrationSet) -> dict[str, Any]:
    """Mean KL per domain, parameters that are left, and seconds."""
    start = biased(bench.base, bench.out / "biased") if text.endswith("@biased") else None
    ran = bench.run(stages_of(text), calibration, start)
    kl = bench.kl(text, ran.checkpoint)
    return {"kl": kl, "parameters": parameters(ran.checkpoint), "seconds": ran.seconds}


def beside(bench: Bench, first: str, text: str) -> str:
    """Two cells: differences of the mean and of the worst KL."""
    if first == text:
        return "– | –"
    return " | ".join(map(percent, bench.against(first, text).values()))


def table(bench: Bench, rows: dict[str, dict[str, Any]], seen: frozenset[str]) -> list[str]:
    """Markdown: a row per method."""
    first = next(iter(rows))
    domains = sorted(next(iter(rows.values()))["kl"])
    heads = [domain if domain in seen else f"{domain}*" for domain in domains]
    lines = [
        f"| method | parameters | {' | '.join(heads)} | mean | worst "
        "| mean beside the first | worst beside the first | seconds |",
        "|" + "---|" * (len(domains) + 7),
    ]
    lines += [
        f"| {text} | {row['parameters'] / 1e6:.2f}M | {kl_row(row['kl'])} "
        f"| {beside(bench, first, text)} | {row['seconds']:.0f} |"
        for text, row in rows.items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--documents", type=int, default=None)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--mix", default="english")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--stage", action="append", required=True, help="method:option=value,…")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/prune"))
    parser.add_argument("--results", type=Path, help="also write the table here")
    options = parser.parse_args()
    with quiet():
        bench = Bench(
            options.model,
            options.out,
            suite=options.suite,
            documents=options.documents,
            length=options.window,
        )
        kept, rows = Kept(options.out / "rows.jsonl"), {}
        calibration = bench.calibration(options.mix, options.samples, options.length)
        for text in options.stage:
            rows[text] = kept.get(text, row, bench, text, calibration)
            print(f"{text}: {kl_row(rows[text]['kl'])}", flush=True)
        lines = table(bench, rows, frozenset(calibration.tokens))
    print("\n".join(lines))
    if options.results:
        options.results.write_text("\n".join([origin(bench.session.device), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
