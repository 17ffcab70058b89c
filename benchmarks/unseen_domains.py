#!/usr/bin/env python3
"""What calibration on one kind of text does to the others: KL per domain, cell by cell.

    python benchmarks/unseen_domains.py --bits 4,3 --calibrate default,prose,code \
        --stage rtn:grid=mse --stage gptq:damping=0.1,propagate=0.5 [--suite quick]
        [--model builtin:tiny] [-o out/unseen]

Every stage runs once per width and calibration text (a shipped mix or one domain), groups of 64,
fp32 on the CPU, and is scored on the suite against the original. Cells that OUT/cells.jsonl holds
already are not run again. The table has the mean over domains and the worst ratio of a domain's
KL to that of the first stage of the same width, which should be rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches, mixes
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.measure import TokenScores
from compressor.evaluation.session import BASE, Session
from compressor.model.load import load_tokenizer, resolve
from compressor.model.quiet import quiet
from compressor.progress import SilentObserver
from compressor.provenance import combined_sha256, hash_files
from compressor.registry import registry
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext

ACTIVATIONS = 1 << 30


def stage_of(text: str, bits: int) -> StageConfig:
    """`gptq:damping=0.1` at a width."""
    name, _, rest = text.partition(":")
    options = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
    method = f"quantize.{name}"
    config = registry().get(method)
    return config.model_validate(
        {"method": method, "bits": bits, "group_size": 64} | options, strict=False
    )


def calibration_of(name: str, tokenizer: Any, out: Path, size: tuple[int, int]) -> CalibrationSet:
    """A shipped mix, or text of one domain only."""
    mix = name
    if name not in mixes():
        path = out / f"{name}.yaml"
        path.write_text(f"name: {name}\ndescription: one domain\ndomains: {{{name}: 1.0}}\n")
        mix = str(path)
    return build_batches(CalibrationConfig(mix=mix, samples=size[0], length=size[1]), tokenizer)


class Bench:
    """One model, one suite, one folder of results."""

    def __init__(self, model: str, suite: str, out: Path, documents: int | None = None) -> None:
        self.out, self.base = out, resolve(model).path
        self.tokenizer = load_tokenizer(self.base)
        self.session = Session(
            config=EvaluateConfig(
                suite=suite, documents=documents, resamples=100, noise_floor=False
            ),
            base=self.base,
            base_sha256=combined_sha256(hash_files(self.base)),
            tokenizer=self.tokenizer,
            context_length=json.loads((self.base / "config.json").read_text())[
                "max_position_embeddings"
            ],
            seen=frozenset(),
            folder=out / f"scores-{suite}",
            cache=out / "base",
            device=torch.device("cpu"),
            dtype=torch.float32,
            activation_budget=ACTIVATIONS,
            observer=SilentObserver(),
        )
        if not (self.session.folder / f"{BASE}.npz").is_file():
            self.session.measure(BASE, self.base)

    def cell(self, stage: StageConfig, calibration: CalibrationSet, name: str) -> dict[str, Any]:
        """Mean KL per domain, and seconds of the stage."""
        folder, scratch = self.out / "checkpoint", self.out / "scratch"
        for path in (folder, scratch):
            shutil.rmtree(path, ignore_errors=True)
        context = StageContext(
            folder=folder,
            scratch=scratch,
            device=self.session.device,
            dtype=self.session.dtype,
            activation_budget=ACTIVATIONS,
            finished=(),
            block_done=lambda _: None,
            observer=SilentObserver(),
        )
        began = time.perf_counter()
        stage.run(self.base, calibration, context)
        seconds = time.perf_counter() - began
        self.session.measure(name, folder)
        scores = TokenScores.load(self.session.folder / f"{name}.npz")
        kl = {
            domain: float(np.mean(scores.kl[scores.domain == number], dtype=np.float64))
            for number, domain in enumerate(scores.domains)
        }
        return {"kl": kl, "seconds": seconds}


def table(cells: dict[str, dict[str, Any]], keys: list[tuple[str, str, int]]) -> list[str]:
    """Markdown: a row per stage, width and calibration text."""
    domains = sorted(next(iter(cells.values()))["kl"])
    first = keys[0][0]
    lines = [
        f"| W | stage | calibrated on | {' | '.join(domains)} | mean | worst / {first} |",
        "|" + "---|" * (len(domains) + 5),
    ]
    for stage, text, bits in keys:
        kl = cells[f"{stage}/{text}/{bits}"]["kl"]
        simple = cells[f"{first}/{text}/{bits}"]["kl"]
        worst = max(kl[domain] / simple[domain] for domain in domains)
        values = " | ".join(f"{kl[domain]:.4f}" for domain in domains)
        mean = sum(kl.values()) / len(kl)
        lines.append(f"| {bits} | {stage} | {text} | {values} | {mean:.4f} | {worst:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--calibrate", default="default,prose,code")
    parser.add_argument("--stage", action="append", required=True, help="method:option=value,…")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/unseen"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {line["key"]: line for line in map(json.loads, lines)}
    texts, widths = options.calibrate.split(","), [int(bits) for bits in options.bits.split(",")]
    keys = [(s, text, bits) for bits in widths for text in texts for s in options.stage]
    with quiet():
        bench = Bench(options.model, options.suite, options.out)
        size = (options.samples, options.length)
        sets = {text: calibration_of(text, bench.tokenizer, options.out, size) for text in texts}
        for stage, text, bits in keys:
            key = f"{stage}/{text}/{bits}"
            if key not in cells:
                name = re.sub(r"[^\w.-]", "~", key)  # the session quotes what is not plain
                found = bench.cell(stage_of(stage, bits), sets[text], name)
                cells[key] = {"key": key, **found}
                with path.open("a") as file:
                    file.write(json.dumps(cells[key]) + "\n")
    print("\n".join(table(cells, keys)))


if __name__ == "__main__":
    main()
