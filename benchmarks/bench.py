"""What the benchmarks share: one model and one suite, stages that run, and their KL."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches, mixes
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.measure import TokenScores
from compressor.evaluation.results import Estimate
from compressor.evaluation.session import BASE, Session
from compressor.evaluation.statistics import Bootstrap, Floats
from compressor.machine import activation_budget
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import resolve
from compressor.progress import SilentObserver
from compressor.provenance import environment
from compressor.registry import registry
from compressor.sessions import open_session
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.types import StageResult


@dataclass(frozen=True)
class Ran:
    """Stages that were run one after another.

    Attributes:
        checkpoint: what they left.
        results: of every stage.
        seconds: of all of them.
    """

    checkpoint: Path
    results: tuple[StageResult, ...]
    seconds: float


class Bench:
    """One model, one suite, one folder of results; the original is measured when it is opened."""

    def __init__(self, model: str, out: Path, **evaluation: Any) -> None:
        self.out, self.base = out, resolve(model).path
        out.mkdir(parents=True, exist_ok=True)
        config = EvaluateConfig(**{"resamples": 100, "noise_floor": False} | evaluation)
        self.session: Session = open_session(
            self.base,
            config,
            folder=out / f"scores-{config.suite}",
            cache=out / "base",
            observer=SilentObserver(),
            seen=frozenset(),
        )
        if not self.session.holds(BASE):
            self.session.measure(BASE, self.base)

    def calibration(self, name: str, samples: int, length: int) -> CalibrationSet:
        """A shipped mix, or text of one domain only."""
        mix = name
        if name not in mixes():
            path = self.out / f"{name}.yaml"
            path.write_text(f"name: {name}\ndescription: one domain\ndomains: {{{name}: 1.0}}\n")
            mix = str(path)
        config = CalibrationConfig(mix=mix, samples=samples, length=length)
        return build_batches(config, self.session.tokenizer)

    def run(
        self,
        stages: Sequence[StageConfig],
        calibration: CalibrationSet,
        start: Path | None = None,
    ) -> Ran:
        """Run stages on the original, or on `start`; what an earlier call left is gone."""
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        checkpoint, results, began = start or self.base, [], time.perf_counter()
        for number, stage in enumerate(stages):
            context = StageContext(
                folder=work / f"{number}",
                scratch=work / f"scratch-{number}",
                device=self.session.device,
                dtype=torch.float32,
                activation_budget=activation_budget(),
                finished=(),
                block_done=lambda _: None,
                observer=SilentObserver(),
                original=self.base,
            )
            results.append(stage.run(checkpoint, calibration, context))
            checkpoint = results[-1].checkpoint
        return Ran(checkpoint, tuple(results), time.perf_counter() - began)

    def kl(self, name: str, checkpoint: Path) -> dict[str, float]:
        """Mean KL to the original by domain, nats per token."""
        self.session.measure(name, checkpoint)
        scores = self.session.scores(name)
        return {
            domain: float(np.mean(scores.kl[scores.domain == number], dtype=np.float64))
            for number, domain in enumerate(scores.domains)
        }

    def against(self, first: str, name: str) -> dict[str, Estimate]:
        """How much nearer to the original than `first` a variant is: `mean` and `worst` domain.

        Both are ratios of KL less 1, with the interval from documents that are resampled together.
        """
        return nearer(self.session.scores(first), self.session.scores(name))


def nearer(first: TokenScores, other: TokenScores) -> dict[str, Estimate]:
    """As `Bench.against`, of scores of the same text."""
    sums = [np.ones_like(first.kl), first.kl, other.kl]
    strata = [
        _by_document(first.cluster, sums, first.domain == number)
        for number in range(len(first.domains))
    ]
    bootstrap = Bootstrap(strata)
    reduced = {"mean": np.mean, "worst": np.max}
    return {kind: bootstrap.interval(_ratio(reduce)) for kind, reduce in reduced.items()}


def _by_document(
    cluster: NDArray[np.int32], columns: Sequence[NDArray[Any]], rows: NDArray[np.bool_]
) -> Floats:
    """Sums [documents, columns] of one domain."""
    _, place = np.unique(cluster[rows], return_inverse=True)
    return np.stack([np.bincount(place, weights=column[rows]) for column in columns], axis=1)


def _ratio(reduce: Callable[..., Any]) -> Callable[[Floats], Floats]:
    """From totals [..., domains, (tokens, KL, KL)]."""

    def statistic(totals: Floats) -> Floats:
        first, other = (reduce(totals[..., column] / totals[..., 0], axis=-1) for column in (1, 2))
        return np.asarray(other / first - 1)

    return statistic


def origin(device: torch.device) -> str:
    """A line for the head of a table of results: the command, the commit and the machine."""
    env = environment(device)
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"`python {command}` at commit `{env.commit}`; {env.hardware.cores} cores "
        f"({env.hardware.cpu}), torch {env.torch}"
    )


def stage(options: dict[str, Any]) -> StageConfig:
    """A configured stage from what a recipe would say; text stands for numbers as well."""
    return registry().get(options["method"]).model_validate(options, strict=False)


def parameters(checkpoint: Path) -> int:
    """Of a dense checkpoint."""
    return Architecture.from_config(read_config(checkpoint)).parameters


class Kept:
    """Cells in a file of JSON lines: what is there is not computed again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._cells = {line["key"]: line for line in map(json.loads, lines)}

    def get(self, key: str, compute: Callable[..., dict[str, Any]], *inputs: Any) -> dict[str, Any]:
        """The cell of that name, computed from the inputs and written if it is new."""
        if key not in self._cells:
            self._cells[key] = {"key": key, **compute(*inputs)}
            with self._path.open("a") as file:
                file.write(json.dumps(self._cells[key]) + "\n")
        return dict(self._cells[key])


def kl_row(kl: dict[str, float]) -> str:
    """Cells of a Markdown row: every domain in the order of names, mean, worst."""
    values = [kl[domain] for domain in sorted(kl)]
    return " | ".join(f"{v:.4f}" for v in [*values, sum(values) / len(values), max(values)])


def percent(difference: Estimate) -> str:
    """A relative difference with its interval."""
    text = f"{100 * difference.value:+.1f} %"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
