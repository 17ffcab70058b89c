#!/usr/bin/env python3
"""Pruning methods side by side: KL to the original per domain, same calibration text for all.

    python benchmarks/prune_methods.py --model cache/SmolLM2-135M-Instruct \
        --stage depth:layers=23,score=influence --stage width:ratio=0.2,score=wanda \
        --stage width:ratio=0.2,score=flap@biased --stage obs:ratio=0.2 [-o out/prune]

`--stage` is a method of the family `prune` with its options; several in a row are joined by `+`.
With `@biased` the stage starts from a copy of the model with biases of zero in attention and
feed-forward halves (Llama's `attention_bias`, `mlp_bias`), which computes the same: FLAP puts into
them what the removed channels put out on average, as published. Everything is fp32 on the CPU; rows
that OUT/rows.jsonl holds already are not run again. Domains are those of the suite; what the
calibration mix does not hold is marked by `*`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.measure import TokenScores
from compressor.evaluation.session import BASE, Session
from compressor.formats.files import copy_parent_files
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer, resolve
from compressor.model.quiet import quiet
from compressor.progress import SilentObserver
from compressor.provenance import combined_sha256, hash_files
from compressor.registry import registry
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext

ACTIVATIONS = 2 << 30


def stages_of(text: str) -> list[StageConfig]:
    """`depth:layers=28+obs:ratio=0.1` as configured stages; a list stands in brackets."""
    found = []
    for part in text.removesuffix("@biased").split("+"):
        name, _, rest = part.partition(":")
        pairs = (pair.split("=", 1) for pair in rest.split(",") if pair)
        options = {key: json.loads(value) if value[0] == "[" else value for key, value in pairs}
        method = f"prune.{name}"
        config = registry().get(method)
        found.append(config.model_validate({"method": method} | options, strict=False))
    return found


def biased(base: Path, folder: Path) -> Path:
    """The same function with zero biases that a method may fill."""
    config = {**read_config(base), "attention_bias": True, "mlp_bias": True}
    reader = CheckpointReader(base)
    tensors = {name: reader[name] for name in reader}
    dtype = next(iter(tensors.values())).dtype
    for name, shape in Architecture.from_config(config).tensors():
        tensors.setdefault(name, torch.zeros(shape, dtype=dtype))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    copy_parent_files(base, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Bench:
    """One model, one suite, one folder of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.base = options.out, resolve(options.model).path
        self.tokenizer = load_tokenizer(self.base)
        config = EvaluateConfig(
            suite=options.suite,
            documents=options.documents,
            length=options.window,
            resamples=100,
            noise_floor=False,
        )
        self.session = Session(
            config=config,
            base=self.base,
            base_sha256=combined_sha256(hash_files(self.base)),
            tokenizer=self.tokenizer,
            context_length=Architecture.from_config(read_config(self.base)).max_positions,
            seen=frozenset(),
            folder=self.out / "scores",
            cache=self.out / "base",
            device=torch.device("cpu"),
            dtype=torch.float32,
            activation_budget=ACTIVATIONS,
            observer=SilentObserver(),
        )
        if not (self.session.folder / f"{BASE}.npz").is_file():
            self.session.measure(BASE, self.base)

    def row(self, text: str, name: str, calibration: CalibrationSet) -> dict[str, Any]:
        """Mean KL per domain, parameters that are left, and seconds."""
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        checkpoint = biased(self.base, work / "biased") if text.endswith("@biased") else self.base
        began = time.perf_counter()
        for number, stage in enumerate(stages_of(text)):
            context = StageContext(
                folder=work / f"{number}",
                scratch=work / f"scratch-{number}",
                device=torch.device("cpu"),
                dtype=torch.float32,
                activation_budget=ACTIVATIONS,
                finished=(),
                block_done=lambda _: None,
                observer=SilentObserver(),
            )
            checkpoint = stage.run(checkpoint, calibration, context).checkpoint
        seconds = time.perf_counter() - began
        self.session.measure(name, checkpoint)
        scores = TokenScores.load(self.session.folder / f"{name}.npz")
        kl = {
            domain: float(np.mean(scores.kl[scores.domain == number], dtype=np.float64))
            for number, domain in enumerate(scores.domains)
        }
        left = Architecture.from_config(read_config(checkpoint)).parameters
        return {"stage": text, "kl": kl, "parameters": left, "seconds": seconds}


def table(rows: list[dict[str, Any]], seen: frozenset[str]) -> list[str]:
    """Markdown: a row per method."""
    domains = sorted(rows[0]["kl"])
    heads = [domain if domain in seen else f"{domain}*" for domain in domains]
    lines = [
        f"| method | parameters | {' | '.join(heads)} | mean | worst | seconds |",
        "|" + "---|" * (len(domains) + 5),
    ]
    for row in rows:
        kl = row["kl"]
        values = " | ".join(f"{kl[domain]:.4f}" for domain in domains)
        lines.append(
            f"| {row['stage']} | {row['parameters'] / 1e6:.2f}M | {values} | "
            f"{sum(kl.values()) / len(kl):.4f} | {max(kl.values()):.4f} | {row['seconds']:.0f} |"
        )
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
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {row["stage"]: row for row in map(json.loads, lines)}
    with quiet():
        bench = Bench(options)
        config = CalibrationConfig(mix=options.mix, samples=options.samples, length=options.length)
        calibration = build_batches(config, bench.tokenizer)
        for number, text in enumerate(options.stage):
            if text not in rows:
                rows[text] = bench.row(text, f"row-{len(rows)}-{number}", calibration)
                with path.open("a") as file:
                    file.write(json.dumps(rows[text]) + "\n")
                print("\n".join(table([rows[text]], frozenset(calibration.tokens))), flush=True)
    print("\n".join(table([rows[text] for text in options.stage], frozenset(calibration.tokens))))


if __name__ == "__main__":
    main()
