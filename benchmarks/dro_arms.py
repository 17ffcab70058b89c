#!/usr/bin/env python3
"""Does leaning towards the worst domain do real work? Seven arms on text whose truth is known.

    python benchmarks/dro_arms.py [--seeds 6] [--first 0] [--steps 400] [--radius 1.0] [-o out/dro]

A small Llama learns four domains from nothing: `easy` (a fixed cycle), `slow` and `rare` (values
that belong to keys, to be memorised; some keys are seldom) and `noise` (uniform tokens, of which
nothing can be learned). Shares of the text are 0.45, 0.25, 0.05 and 0.25. All arms of a seed begin
with the same weights, see as many tokens and are scored on windows that nothing else sees: by the
excess over an oracle, the same model trained on that domain alone:

    uniform    a quarter each              static     the shares of the text
    dro-none   leans by the loss           dro        leans by the loss over its forecast
    replay     the mean shares of `dro`    placebo    `dro` with shuffled names of domains
    anti       `dro` the wrong way

Cells (arm, seed) that OUT/cells.jsonl holds already are not run again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import Kept
from scipy import stats
from torch import Tensor

from compressor.progress import SilentObserver
from compressor.stages.sampling import Leaning, Rows, Sampler, Source
from compressor.training import Schedule, fit
from compressor.types import TokenBatch

SHARES = {"easy": 0.45, "noise": 0.25, "rare": 0.05, "slow": 0.25}
ARMS = ("uniform", "static", "dro-none", "dro", "replay", "placebo", "anti")
LENGTH, BATCH, TEXT, HELD = 32, 16, 24_000, 32
_VALUES = 32  # tokens of `easy`, of `noise`, and of what belongs to a key
_KEYS = {"rare": 128, "slow": 384}
_VOCABULARY = _VALUES + sum(_KEYS.values()) + len(SHARES)
_DEVELOPMENT, _EVALUATION = 1, 2  # of a seed's generators


@dataclass(frozen=True)
class Size:
    """How long an arm trains, and how far it leans."""

    steps: int
    radius: float


class Text:
    """The four domains of a seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self._values = {
            name: torch.randint(_VALUES, (count,), generator=generator)
            for name, count in _KEYS.items()
        }
        self._seed = seed

    def windows(self, domain: str, count: int, part: int) -> Tensor:
        """Token ids [count, LENGTH]; the first names the domain."""
        place = 16 * self._seed + 4 * part + sorted(SHARES).index(domain)
        generator = torch.Generator().manual_seed(place)
        ids = torch.randint(_VALUES, (count, LENGTH), generator=generator)
        if domain == "easy":
            ids = (ids[:, :1] + torch.arange(LENGTH)) % _VALUES
        elif domain in _KEYS:
            keys = _KEYS[domain]
            often = 1 / torch.arange(1, keys + 1)  # Zipf's law
            drawn = torch.multinomial(
                often.expand(count, keys), LENGTH // 2, replacement=True, generator=generator
            )
            offset = _VALUES + (_KEYS["rare"] if domain == "slow" else 0)
            ids = (
                torch.stack([drawn + offset, self._values[domain][drawn]], -1).flatten(1).roll(1, 1)
            )
        ids[:, 0] = _VOCABULARY - 1 - sorted(SHARES).index(domain)
        return ids

    def held(self, part: int, count: int) -> dict[str, Tensor]:
        """Windows of every domain."""
        return {name: self.windows(name, count, part) for name in SHARES}


def model(seed: int) -> Any:
    """A Llama of 100,000 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            attn_implementation="sdpa",
        )
    )


def losses(student: Any, ids: Tensor) -> Tensor:
    """Mean loss of every window in nats per token, fp64 [windows]."""
    logits = student(ids, use_cache=False).logits[:, :-1].transpose(1, 2)
    found = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    return found.mean(1).double()


class Flipped(Sampler):
    """Leans towards what is learned best."""

    def _excess(self, loss: Tensor, reference: Tensor) -> Tensor:
        return reference - loss


class Replayed(Sampler):
    """Fixed shares of somebody else's."""

    given: Mapping[str, float]

    def shares(self, step: int) -> Tensor:
        """The same at every update."""
        super().shares(step)
        return torch.tensor([self.given[name] for name in sorted(SHARES)], dtype=torch.float64)


def rows_of(text: Text, shares: Mapping[str, float], labels: Tensor | None) -> Rows:
    """Training text; with labels, the names of its windows are shuffled."""
    counts = {name: round(TEXT * share) for name, share in shares.items() if share}
    ids = torch.cat([text.windows(name, count, 0) for name, count in counts.items()])
    names = [name for name, count in counts.items() for _ in range(count)]
    if labels is not None:
        names = [names[place] for place in labels.tolist()]
    return Rows([TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), tuple(names))])


def train(arm: str, seed: int, size: Size, replay: Mapping[str, float] | None) -> dict[str, Any]:
    """One arm: losses by domain on held-out windows, and mean shares."""
    text, student, placebo = Text(seed), model(seed), arm == "placebo"
    own = arm.removeprefix("oracle-")
    shares = {own: 1.0} if own in SHARES else dict.fromkeys(SHARES, 0.25)
    shares = shares if own in SHARES or arm == "uniform" else SHARES
    order = torch.randperm(TEXT, generator=torch.Generator().manual_seed(seed))
    rows = rows_of(text, shares, order if placebo else None)
    held = text.held(_DEVELOPMENT, HELD)
    if placebo:
        mixed = torch.cat(list(held.values()))[
            torch.randperm(HELD * len(held), generator=torch.Generator().manual_seed(seed))
        ]
        held = dict(zip(held, mixed.split(HELD), strict=True))

    @torch.no_grad()
    def measure() -> dict[str, Tensor]:
        return {name: losses(student, ids) for name, ids in held.items() if name in rows.domains}

    leans = arm in ("dro", "dro-none", "placebo", "anti")
    options = Leaning(
        sampler="dro" if leans else "static",
        radius=size.radius,
        reference="original" if arm == "dro-none" else "forecast",
        drift=leans,
        every=max(1, size.steps // 50),
        batch=BATCH,
    )
    with tempfile.TemporaryDirectory() as folder:
        kind = {"anti": Flipped, "replay": Replayed}.get(arm, Sampler)
        path = Path(folder) / "dro.jsonl"
        sampler = kind(options, rows, Source(measure), size.steps, path, SilentObserver())
        if isinstance(sampler, Replayed):
            sampler.given = replay or {}

        def loss(step: int) -> Tensor:
            chosen = rows.draw(sampler.shares(step), BATCH, seed, step)
            return losses(student, rows.batch(chosen).input_ids).mean().float()

        schedule = Schedule(size.steps, learning_rate=3e-3, clip=1.0, every=10**9)
        fit(dict(student.named_parameters()), loss, schedule, Path(folder), SilentObserver())
    with torch.no_grad():
        score = {n: float(losses(student, w).mean()) for n, w in text.held(_EVALUATION, 64).items()}
    history = [entry["shares"] for entry in sampler.history]
    mean = {name: sum(h.get(name, 0.0) for h in history) / len(history) for name in SHARES}
    return {"loss": score, "shares": mean}


def summary(cell: Mapping[str, Any], oracle: Mapping[str, float]) -> tuple[float, float]:
    """Worst excess over the oracle, and mean loss."""
    worst = max(cell["loss"][name] - oracle[name] for name in SHARES)
    return worst, sum(cell["loss"].values()) / len(SHARES)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half of its 95 % interval (Student)."""
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(values))
    return float(found.mean()), float(stats.t.ppf(0.975, len(values) - 1)) * error


def table(cells: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    """Markdown: an arm a row, with paired differences to `static` and `uniform`."""
    oracle = [
        {name: cells[f"oracle-{name}", seed]["loss"][name] for name in SHARES} for seed in seeds
    ]
    found = {
        arm: [summary(cells[arm, s], own) for s, own in zip(seeds, oracle, strict=True)]
        for arm in ARMS
    }
    head = "| arm | worst excess | to static | to uniform | mean loss | to static | shares |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for arm in ARMS:
        worst = sum(pair[0] for pair in found[arm]) / len(seeds)
        mean = sum(pair[1] for pair in found[arm]) / len(seeds)
        against = [_against(found, arm, *which) for which in (("static", 0), ("uniform", 0))]
        shares = ", ".join(
            f"{name} {sum(cells[arm, s]['shares'][name] for s in seeds) / len(seeds):.2f}"
            for name in SHARES
        )
        change = _against(found, arm, "static", 1)
        lines.append(
            f"| {arm} | {worst:.4f} | {' | '.join(against)} | {mean:.4f} | {change} | {shares} |"
        )
    return lines


def _against(found: Mapping[str, list[tuple[float, float]]], arm: str, other: str, at: int) -> str:
    """Mean paired difference in percent of the other arm's mean, ± half of its interval."""
    if arm == other:
        return "–"
    pairs = zip(found[arm], found[other], strict=True)
    mean, half = interval([one[at] - two[at] for one, two in pairs])
    base = sum(pair[at] for pair in found[other]) / len(found[other])
    return f"{100 * mean / base:+.1f} ± {100 * half / base:.1f} %"


def run(out: Path, seeds: Sequence[int], size: Size) -> list[str]:
    """Every cell that is missing, then the table."""
    out.mkdir(parents=True, exist_ok=True)
    kept, cells = Kept(out / "cells.jsonl"), {}
    for seed in seeds:
        for arm in (*(f"oracle-{name}" for name in SHARES), *ARMS):
            replay = cells["dro", seed]["shares"] if arm == "replay" else None
            key = f"{arm}/{seed}/{size.steps}/{size.radius:g}"
            cells[arm, seed] = kept.get(key, train, arm, seed, size, replay)
    return table(cells, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--radius", type=float, default=1.0)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/dro"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(options.steps, options.radius)
    seeds = range(options.first, options.first + options.seeds)
    print("\n".join(run(options.out, seeds, size)))


if __name__ == "__main__":
    main()
