#!/usr/bin/env python3
"""What recovery gives back after pruning, and whether pruning pays beside quantization alone.

    python benchmarks/recovery.py --model cache/SmolLM2-135M-Instruct --minutes 20 \
        [--tokens 1000000] [--precision bf16] [--prune '{method: prune.search, …}'] \
        [--pruned FOLDER] [--training '{length: 256, …}'] [--suite quick] \
        [--documents N] [-o out/recovery] [--results FILE.md]

The model is pruned once (or taken from `--pruned`), then distilled from the original for so many
minutes twice: with the domains' shares as they are in the text (`static`), and leaning to the worst
(`dro`). Every result is rounded to 4 bits (GPTQ, groups of 64); beside them stands the original,
unpruned, at as many bytes by mixed precision. KL to the original by domain on the suite, fp32. What
OUT holds already is not run again.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Bench, Kept, kl_row, origin, parameters, stage
from ruamel.yaml import YAML

from compressor.calibration import CalibrationSet
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.quiet import quiet

PRUNE = "{method: prune.search, ratio: 0.2, depths: [8], attention: [whole], multiple: 64}"
ROUND = {"method": "quantize.gptq", "bits": 4, "group_size": 64, "symmetry": "full_range"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--minutes", type=float, required=True, help="of each training")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="if the time suffices")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--prune", default=PRUNE, help="a stage in YAML")
    parser.add_argument("--pruned", type=Path, help="a checkpoint of the model, pruned already")
    parser.add_argument("--training", default="{}", help="further options of recover.distill, YAML")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/recovery"))
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


@dataclass
class Arms:
    """Checkpoints of one model and what they cost."""

    bench: Bench
    calibration: CalibrationSet
    kept: Kept
    out: Path

    def made(self, name: str, start: Path | None, *stages: dict[str, Any]) -> Path:
        """What stages make of a checkpoint, or of the original; it stays in OUT with its row."""
        folder = self.out / "checkpoints" / name
        self.kept.get(name, self._row, name, start, stages, folder)
        return folder

    def taken(self, name: str, folder: Path) -> Path:
        """A checkpoint that is there already, with its row."""
        self.kept.get(name, self._measured, name, folder, 0.0, (), {})
        return folder

    def _row(
        self, name: str, start: Path | None, stages: tuple[dict[str, Any], ...], folder: Path
    ) -> dict[str, Any]:
        ran = self.bench.run([stage(settings) for settings in stages], self.calibration, start)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        shutil.move(ran.checkpoint, folder)
        result = ran.results[-1]
        return self._measured(name, folder, ran.seconds, result.metrics, result.notes)

    def _measured(
        self, name: str, folder: Path, seconds: float, metrics: Any, notes: Any
    ) -> dict[str, Any]:
        return {
            "kl": self.bench.kl(name, folder),
            "bytes": round(checkpoint_bytes(folder, metrics)),
            "parameters": parameters(folder),
            "seconds": seconds,
            "notes": dict(notes),
        }


def checkpoint_bytes(folder: Path, metrics: Any) -> float:
    """Of the whole checkpoint: matrices that were rounded at their bits, the rest at 16."""
    architecture = Architecture.from_config(read_config(folder))
    bits = {metric.module: metric.bits for metric in metrics}
    rounded = {m.name: m.parameters for m in architecture.matrices if m.name in bits}
    spent = sum(size * bits[name] for name, size in rounded.items())
    return (spent + 16 * (architecture.parameters - sum(rounded.values()))) / 8


def table(kept: Kept, names: list[str]) -> list[str]:
    """Markdown: a row for every checkpoint."""
    cells = {name: kept.get(name, dict) for name in names}
    domains = sorted(next(iter(cells.values()))["kl"])
    lines = [
        f"| checkpoint | MB | {' | '.join(domains)} | mean | worst | updates | seconds |",
        "|" + "---|" * (len(domains) + 6),
    ]
    for name, cell in cells.items():
        updates = cell["notes"].get("updates")
        lines.append(
            f"| {name} | {cell['bytes'] / 1e6:.1f} | {kl_row(cell['kl'])} "
            f"| {'–' if updates is None else round(updates)} | {cell['seconds']:.0f} |"
        )
    return lines


def main() -> None:
    options = arguments()
    with quiet():
        bench = Bench(options.model, options.out, suite=options.suite, documents=options.documents)
        calibration = bench.calibration("default", options.samples, options.length)
        arms = Arms(bench, calibration, Kept(options.out / "rows.jsonl"), options.out)
        prune, more = (YAML(typ="safe").load(text) for text in (options.prune, options.training))
        taken = options.pruned
        pruned = arms.taken("pruned", taken) if taken else arms.made("pruned", None, prune)
        dense = {"pruned": pruned}
        for sampler in ("static", "dro"):
            training = {
                "method": "recover.distill", "mix": "default", "tokens": options.tokens,
                "minutes": options.minutes, "precision": options.precision, "sampler": sampler,
                **more,
            }  # fmt: skip
            dense[f"recovered, {sampler}"] = arms.made(f"recovered, {sampler}", pruned, training)
        rounded = [f"{name}, W4" for name in dense]
        for name, start in zip(rounded, dense.values(), strict=True):
            arms.made(name, start, ROUND)
        budget = arms.kept.get(rounded[0], dict)["bytes"]
        arms.made("original, W4", None, ROUND)
        fewer = {"method": "allocate.bits", "target_size": f"{budget / 1e6:.1f}MB",
                 "symmetry": ROUND["symmetry"]}  # fmt: skip
        arms.made("original, mixed", None, fewer, {"method": "quantize.gptq"})
        names = [*dense, *rounded, "original, W4", "original, mixed"]
        text = "\n".join(table(arms.kept, names))
    print(text)
    if options.results:
        options.results.write_text(f"{origin(bench.session.device)}\n\n{text}\n")


if __name__ == "__main__":
    main()
