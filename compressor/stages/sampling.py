"""Which windows of text an update sees: domains by their shares, which may lean and drift.

An update's windows follow from its number, the seed and the shares; shares follow from the lines of
`dro.jsonl`, one for every measurement. So the file is all the state there is: a measurement behind
the checkpoint that training goes on from is made again, with the same outcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats.atomic import atomic_write_text
from compressor.numerics.forecast import forecast
from compressor.numerics.robust import chi_square_weights, drifted, guarded_radius
from compressor.progress import Observer
from compressor.types import Fallback, MixturePoint, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.train_base import Counted, Shares

MEASUREMENTS = 40  # planned ones that a forecast needs
_KNOWN = 11  # measurements that a law is fitted to at least
_USUAL = 7  # forecasts of which the median counts
_SETTLED, _FORECAST, _DRIFT = 0.02, 0.1, 0.2  # of training: when points count, and what begins

Windows = Mapping[str, Tensor]
"""Losses of held-out windows in nats per token, fp64 [windows], by domain."""


class Rows:
    """Windows of text by domain, drawn by the number of the update.

    Args:
        batches: the text.
    """

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        found = [
            (domain, ids, mask)
            for batch in batches
            for domain, ids, mask in zip(batch.domains, batch.input_ids, batch.mask, strict=True)
        ]
        self.domains = tuple(sorted({domain for domain, _, _ in found}))
        self._rows = [(ids[: int(mask.sum())], domain) for domain, ids, mask in found]
        self._by_domain = [
            [number for number, row in enumerate(self._rows) if row[1] == domain]
            for domain in self.domains
        ]
        counts = torch.tensor([len(rows) for rows in self._by_domain], dtype=torch.float64)
        self.shares = counts / counts.sum()
        self.mean_length = sum(len(ids) for ids, _ in self._rows) / len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def counts(self) -> dict[str, int]:
        """Windows of every domain."""
        pairs = zip(self.domains, self._by_domain, strict=True)
        return {domain: len(rows) for domain, rows in pairs}

    def tokens(self, number: int) -> int:
        """Length of a window."""
        return len(self._rows[number][0])

    def draw(self, shares: Tensor, count: int, seed: int, step: int) -> list[int]:
        """Numbers of the windows of an update: domains by their shares, any window of each."""
        generator = torch.Generator().manual_seed(seed * 2**32 + step)
        domains = torch.multinomial(shares, count, replacement=True, generator=generator)
        chosen = []
        for domain in domains.tolist():
            rows = self._by_domain[domain]
            chosen.append(rows[int(torch.randint(len(rows), (), generator=generator))])
        return chosen

    def batch(self, chosen: Sequence[int]) -> TokenBatch:
        """Windows of these numbers, padded on the right."""
        rows = [self._rows[number] for number in chosen]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, (row, _) in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = True
        return TokenBatch(ids, mask, tuple(domain for _, domain in rows))


@dataclass(frozen=True)
class Leaning:
    """Whether and how shares lean; the options of `TrainConfig` of the same names.

    Attributes:
        sampler: `static` shares are those of the text.
        radius: of the ball around them.
        reference: what losses are counted from.
        drift: whether the centre of the ball follows.
        every: updates between two measurements.
        batch: windows in an update.
    """

    sampler: Shares
    radius: float
    reference: Counted
    drift: bool
    every: int
    batch: int


@dataclass(frozen=True)
class Source:
    """What a sampler measures.

    Attributes:
        measure: losses of the model as it is, over whatever the original has.
        kept: share of the original's parameters that it has left.
    """

    measure: Callable[[], Windows]
    kept: Callable[[], float] = lambda: 1.0


class Sampler:
    """Shares of the domains at every update.

    Args:
        options: whether and how they lean.
        rows: the text, with the shares to begin with.
        source: measures domains on held-out text.
        steps: updates of the whole training.
        path: `dro.jsonl`. Every line has the number of the `update` and, by domain: `tokens` drawn
            so far (expected), mean `loss` with its standard `error`, the losses of
            all `windows`, `forecast` and `reference` (what the loss is
            counted from), `base` (centre of the ball) and `shares`; further the `radius` that noise
            has left and the share of the model that is `kept`.
        observer: shown a table of every measurement.
        writes: `path`; of processes that train together, one does.
    """

    def __init__(
        self,
        options: Leaning,
        rows: Rows,
        source: Source,
        steps: int,
        path: Path,
        observer: Observer,
        *,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._options, self._rows, self._source = options, rows, source
        self._steps, self._path, self._observer = steps, path, observer
        lines = path.read_text().splitlines() if path.is_file() else []
        self.history: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def forecasts(self) -> bool:
        """Whether there will be measurements enough to fit a law to."""
        planned = self._steps // self._options.every
        return self._options.reference == "forecast" and planned >= MEASUREMENTS

    def fallbacks(self, module: str) -> tuple[Fallback, ...]:
        """What was done otherwise than asked."""
        asked = self._options.sampler == "dro" and self._options.reference == "forecast"
        if not asked or self.forecasts:
            return ()
        planned = self._steps // self._options.every
        reason = f"{planned} measurements are too few for a forecast, which needs {MEASUREMENTS}"
        return (Fallback(module, reason, "distances were counted from the original"),)

    def shares(self, step: int) -> Tensor:
        """q [domains] of an update; measured anew at every so many of them."""
        static = self._options.sampler == "static"
        if step == 0 or (not static and step % self._options.every == 0):
            self._measure(step)
        entry = next(e for e in reversed(self.history) if e["update"] <= step)
        return self._vector(entry["shares"])

    def finish(self, steps: int) -> None:
        """Measure the trained model."""
        self._measure(steps)

    def mixture(self) -> tuple[MixturePoint, ...]:
        """Shares and losses over time, for the report."""
        return tuple(
            MixturePoint(entry["update"], entry["shares"], entry["loss"]) for entry in self.history
        )

    def _vector(self, values: Mapping[str, float]) -> Tensor:
        return torch.tensor([values[name] for name in self._rows.domains], dtype=torch.float64)

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self._rows.domains, values.tolist(), strict=True))

    def _measure(self, step: int) -> None:
        self.history = [entry for entry in self.history if entry["update"] < step]
        windows = self._source.measure()
        losses = {name: float(values.mean()) for name, values in windows.items()}
        broken = [name for name, value in losses.items() if math.isnan(value)]
        if broken and (step or self._options.sampler == "dro"):
            message = f"the loss of domain {broken[0]!r} before update {step} is no number"
            raise NumericalError(message, "lower `learning_rate`; the run goes on from there")
        entry = {
            "update": step,
            "tokens": self._named(self._drawn(step)),
            "kept": self._source.kept(),
            "loss": losses,
            "error": {name: _error(values) for name, values in windows.items()},
            "windows": {name: values.tolist() for name, values in windows.items()},
        }
        self.history.append(entry)
        entry |= self._leaning(windows)
        if self._writes:
            atomic_write_text(self._path, "".join(f"{json.dumps(e)}\n" for e in self.history))
        self._show(entry)

    def _drawn(self, step: int) -> Tensor:
        """Tokens of every domain before an update, as expected from the shares."""
        if not self.history:
            return torch.zeros(len(self._rows.domains), dtype=torch.float64)
        last = self.history[-1]
        tokens = (step - last["update"]) * self._options.batch * self._rows.mean_length
        drawn: Tensor = self._vector(last["tokens"]) + tokens * self._vector(last["shares"])
        return drawn

    def _leaning(self, windows: Windows) -> dict[str, Any]:
        """Reference, centre, radius and shares; domains without held-out text keep theirs."""
        names, entry = self._rows.domains, self.history[-1]
        base, reference = self._base(), dict.fromkeys(entry["loss"], 0.0)
        shares, radius = base, 0.0
        if self._options.sampler == "dro" and all(name in windows for name in names):
            if self._forecasting(entry["update"]):
                entry["forecast"] = {name: self._forecast(name) for name in names}
                reference = {name: self._usual(name) for name in names}
            excess = self._excess(self._vector(entry["loss"]), self._vector(reference))
            judged = [
                self._spread(name) + value
                for name, value in zip(names, excess.tolist(), strict=True)
            ]
            radius = guarded_radius(self._options.radius, judged)
            if float(excess.max() - excess.min()) > 0:
                shares = chi_square_weights(base, excess, radius)
        return {
            "reference": reference,
            "base": self._named(base),
            "radius": radius,
            "shares": self._named(shares),
        }

    def _spread(self, name: str) -> Tensor:
        """How far the windows of a domain are from its mean, fp64 [windows].

        Against a forecast, which was fitted to the same windows, it is how differently they have
        come down lately: that some are harder than others says nothing of it.
        """
        entry = self.history[-1]
        values = torch.tensor(entry["windows"][name], dtype=torch.float64)
        if self._forecasting(entry["update"]):
            before = self._settled()[-_KNOWN]["windows"][name]
            values = values - torch.tensor(before, dtype=torch.float64)
        return values - values.mean()

    def _excess(self, loss: Tensor, reference: Tensor) -> Tensor:
        """What shares lean by; experiments turn it around."""
        return loss - reference

    def _base(self) -> Tensor:
        """The centre of the ball now."""
        earlier = self.history[:-1]
        if not earlier:
            return self._rows.shares
        last = earlier[-1]
        base = self._vector(last["base"])
        if not self._options.drift or last["update"] < _DRIFT * self._steps:
            return base
        start = self._rows.shares  # where nothing can be told apart, the centre goes back
        return drifted(base, self._vector(last["shares"]) if last["radius"] else start, start)

    def _forecasting(self, step: int) -> bool:
        return self.forecasts and step >= _FORECAST * self._steps and len(self._settled()) >= _KNOWN

    def _settled(self) -> list[dict[str, Any]]:
        return [e for e in self.history if e["update"] >= max(1, _SETTLED * self._steps)]

    def _forecast(self, name: str) -> float:
        """What the law gives for a whole training on this domain alone: the best it could have.

        At the domain's own share, as DRPruning has it, a domain that is seldom seen promises little
        and so asks for little. The latest fit counts, not the lowest so far: what one bad fit has
        promised must not stick.
        """
        known = self._settled()
        tokens, kept, losses = (
            torch.tensor(values, dtype=torch.float64)
            for values in (
                [e["tokens"][name] for e in known],
                [e["kept"] for e in known],
                [e["loss"][name] for e in known],
            )
        )
        at = (self._steps * self._options.batch * self._rows.mean_length, float(kept[-1]))
        return forecast(tokens, kept, losses, at)

    def _usual(self, name: str) -> float:
        """Median of the latest forecasts, as one fit in a few is far off."""
        made = [e["forecast"][name] for e in self.history if "forecast" in e]
        usual: float = median(made[-_USUAL:])
        return usual

    def _show(self, entry: Mapping[str, Any]) -> None:
        head = (
            f"update {entry['update']}/{self._steps}",
            "nats/token",
            "reference",
            "share",
            "in the text",
        )
        rows = [
            (
                name,
                _number(entry["loss"].get(name)),
                _number(entry["reference"].get(name)),
                f"{entry['shares'][name]:.1%}",
                f"{share:.1%}",
            )
            for name, share in zip(self._rows.domains, self._rows.shares.tolist(), strict=True)
        ]
        self._observer.table("domains", head, rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _error(values: Tensor) -> float:
    """Standard error of the mean; 0 where one window tells nothing of it."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
