"""A training loop that is bounded in steps, seeded, and can be killed at any moment.

What a step sees depends on its number alone, so a run taken up from its last checkpoint ends in
the same state as one that was never interrupted. A time box ends training with a checkpoint; the
steps that were done are reported, never hidden. Checkpoints hold whole tensors, however many
processes train, so that a run may go on with more or fewer of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import NumericalError, ResumeError
from compressor.formats.atomic import replacing
from compressor.progress import Observer
from compressor.team import ALONE, Team
from compressor.types import Fallback

_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
_FLOOR = 0.1  # of the peak learning rate, at the end of the cosine


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: updates in all.
        learning_rate: at its peak; a linear rise, then a cosine down to a tenth.
        matrix_rate: of matrices that Muon trains, at the same peak, in steps whose root mean square
            is that of AdamW (Liu et al. 2025, arXiv:2502.16982); None trains all by AdamW.
        warmup: share of the steps in which it rises.
        clip: largest norm of the gradient.
        betas, weight_decay: of AdamW.
        seconds: stop after the step that ends past so long; None never does. Rates then fall with
            the time if that runs out before the steps do.
        every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.05
    clip: float = 0.5
    matrix_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    seconds: float | None = None
    every: int = 50

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step, counted from 0, after so many seconds of training."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        place = float(step)
        if self.seconds:  # as far as the time is, where that is ahead of the steps
            place = max(place, self.steps * min(1.0, seconds / self.seconds))
        done = (place - rise) / max(1, self.steps - rise)
        return self.learning_rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Group:
    """Parameters that train beside the others, at a rate of their own and without decay.

    Attributes:
        parameters: by name, leaf tensors in fp32; names differ from all others.
        rate: the same at every step.
        maximize: climb instead of descend.
    """

    parameters: Mapping[str, Tensor]
    rate: float
    maximize: bool = False


@dataclass(frozen=True)
class Fit:
    """How training went.

    Attributes:
        steps: updates that were made.
        seconds: over all attempts.
        losses: of every step.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]

    def mean_loss(self, steps: slice = slice(-20, None)) -> float:
        """Over some steps, the last ones by default; 0 without any."""
        kept = self.losses[steps]
        return sum(kept) / len(kept) if kept else 0.0


def cut_short(module: str, done: Fit, steps: int, minutes: float | None) -> tuple[Fallback, ...]:
    """What a time box left out; nothing if all was done.

    Args:
        module: whose training it was.
        done: how it went.
        steps: that were asked for.
        minutes: the time box.
    """
    if minutes is None or done.steps >= steps:
        return ()
    reason = f"{minutes:g} minutes were over after {done.steps} of {steps} updates"
    return (Fallback(module, reason, "what it had learned by then was kept"),)


def fit(
    parameters: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    folder: Path,
    observer: Observer,
    label: str = "train",
    watch: Callable[[int], None] | None = None,
    *,
    matrices: Collection[str] = (),
    beside: Sequence[Group] = (),
    team: Team = ALONE,
) -> Fit:
    """Minimise `loss` over `parameters` in place.

    Args:
        parameters: by name, leaf tensors in fp32.
        loss: of a step's own data, a scalar; a function of the step's number and the parameters. In
            a team, the process's part of a sum.
        schedule: length and rates.
        folder: for the checkpoint that an interrupted run goes on from.
        observer: told of every step.
        label: of the progress.
        watch: called with the number of finished steps, before every step and at the end; it may
            look at the parameters, and may be called for the same number again.
        matrices: names of those that Muon trains if the schedule has a rate for them; none may be
            a share of a matrix.
        beside: more parameters; what clips gradients leaves theirs alone.
        team: processes that train together; `parameters` may be shares, and the leader writes.

    Raises:
        NumericalError: a loss is not finite.
        ResumeError: the checkpoint belongs to other parameters.
    """
    optimizers = _Optimizers(parameters, matrices, schedule, beside)
    path = folder / "training.safetensors"
    losses, before = _resumed(path, optimizers, team)
    began = time.monotonic()
    with observer.task(label, schedule.steps) as task:
        task.advance(len(losses))
        for step in range(len(losses), schedule.steps):
            seconds, box = before + time.monotonic() - began, schedule.seconds
            if box is not None:
                seconds = team.hear(seconds)  # clocks differ, and rates must not
            late = box is not None and seconds > box
            if losses and (late or step % schedule.every == 0):
                _save(path, optimizers, losses, seconds, team)
                if late:
                    break
            if watch is not None:
                watch(step)
            optimizers.set_rate(schedule.rate(step, seconds))
            losses.append(_update(optimizers, loss, schedule.clip, step, team))
            task.advance()
    if watch is not None:
        watch(len(losses))
    return Fit(len(losses), before + time.monotonic() - began, tuple(losses))


class _Optimizers:
    """Who trains which parameter, at rates that rise and fall together.

    Args:
        parameters, matrices, schedule, beside: as `fit` takes them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        matrices: Collection[str],
        schedule: Schedule,
        beside: Sequence[Group],
    ) -> None:
        self.own = list(parameters.values())
        self.parameters = dict(parameters)
        for group in beside:
            self.parameters |= group.parameters
        by_muon = set() if schedule.matrix_rate is None else set(matrices)
        own = {
            "params": [parameters[name] for name in parameters if name not in by_muon],
            "lr": schedule.learning_rate,
            "weight_decay": schedule.weight_decay,
        }
        others = [
            {
                "params": list(group.parameters.values()),
                "lr": group.rate,
                "maximize": group.maximize,
                "weight_decay": 0.0,
            }
            for group in beside
        ]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([own, *others], betas=schedule.betas, fused=True)
        ]
        if schedule.matrix_rate is not None and by_muon:
            self._all.append(
                torch.optim.Muon(
                    [parameters[name] for name in parameters if name in by_muon],
                    lr=schedule.matrix_rate,
                    weight_decay=schedule.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self._all]
        self._trained_by = {
            parameter: optimizer
            for optimizer in self._all
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def set_rate(self, rate: float) -> None:
        """The rate of AdamW; Muon's follows. Groups beside keep their own."""
        adamw, *_ = self._peaks
        for optimizer, peak in zip(self._all, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate / adamw

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self._all:
            optimizer.step()

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """What is kept for a parameter from step to step."""
        return _MOMENTS[type(self._trained_by[parameter])]

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter, and its step; to be changed in place."""
        found: dict[str, Tensor] = self._trained_by[parameter].state[parameter]
        return found


def _update(
    optimizers: _Optimizers, loss: Callable[[int], Tensor], clip: float, step: int, team: Team
) -> float:
    optimizers.zero_grad()
    value = loss(step)
    total = float(team.add(value.detach().clone()))
    if not math.isfinite(total):
        raise NumericalError(
            f"the loss of training step {step} is {total}", "lower `learning_rate`"
        )
    value.backward()  # type: ignore[no-untyped-call]
    team.add_gradients(optimizers.parameters)
    torch.nn.utils.clip_grad_norm_(optimizers.own, clip)
    optimizers.step()
    return total


def _save(
    path: Path, optimizers: _Optimizers, losses: list[float], seconds: float, team: Team
) -> None:
    """Weights and their moments in one file, with the losses, whose number is the step."""
    tensors = {}
    for name, parameter in optimizers.parameters.items():
        state = optimizers.state(parameter)
        kinds = {"weight": parameter} | {
            kind: state[kind] for kind in optimizers.moments(parameter)
        }
        for kind, tensor in kinds.items():
            whole = team.whole(tensor)  # every process gives its share
            if team.leads:
                tensors[f"{kind}.{name}"] = whole.cpu().contiguous()
    if not team.leads:
        return
    facts = {"losses": json.dumps(losses), "seconds": json.dumps(seconds)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, facts)


def _resumed(path: Path, optimizers: _Optimizers, team: Team) -> tuple[list[float], float]:
    """Put a checkpoint into place; the losses so far and the seconds they took."""
    if not path.is_file():
        return [], 0.0
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        losses, seconds = json.loads(facts["losses"]), json.loads(facts["seconds"])
        moments = {
            name: optimizers.moments(parameter) for name, parameter in optimizers.parameters.items()
        }
        expected = {f"{kind}.{name}" for name in moments for kind in ("weight", *moments[name])}
        if set(file.keys()) != expected:
            raise ResumeError(f"{path} holds the training of other parameters", "remove it")
        for name, parameter in optimizers.parameters.items():
            with torch.no_grad():
                parameter.copy_(team.like(parameter, file.get_tensor(f"weight.{name}")))
            state = optimizers.state(parameter)
            state["step"] = torch.tensor(float(len(losses)), device=parameter.device)
            for kind in moments[name]:
                state[kind] = team.like(parameter, file.get_tensor(f"{kind}.{name}"))
    return losses, seconds
