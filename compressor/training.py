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
from collections.abc import Callable, Mapping, Sequence
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

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FLOOR = 0.1  # of the peak learning rate, at the end of the cosine


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: updates in all.
        learning_rate: at its peak; a linear rise, then a cosine down to a tenth.
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


def fit(
    parameters: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    folder: Path,
    observer: Observer,
    label: str = "train",
    watch: Callable[[int], None] | None = None,
    *,
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
        beside: more parameters; what clips gradients leaves theirs alone.
        team: processes that train together; `parameters` may be shares, and the leader writes.

    Raises:
        NumericalError: a loss is not finite.
        ResumeError: the checkpoint belongs to other parameters.
    """
    optimizer = _optimizer(parameters, schedule, beside)
    everything = dict(parameters)
    for group in beside:
        everything |= group.parameters
    path = folder / "training.safetensors"
    losses, before = _resumed(path, everything, optimizer, team)
    began = time.monotonic()
    with observer.task(label, schedule.steps) as task:
        task.advance(len(losses))
        for step in range(len(losses), schedule.steps):
            seconds, box = before + time.monotonic() - began, schedule.seconds
            if box is not None:
                seconds = team.hear(seconds)  # clocks differ, and rates must not
            late = box is not None and seconds > box
            if losses and (late or step % schedule.every == 0):
                _save(path, everything, optimizer, losses, seconds, team)
                if late:
                    break
            if watch is not None:
                watch(step)
            rate = schedule.rate(step, seconds)
            losses.append(_update(everything, optimizer, loss, schedule.clip, step, rate, team))
            task.advance()
    if watch is not None:
        watch(len(losses))
    return Fit(len(losses), before + time.monotonic() - began, tuple(losses))


def _optimizer(
    parameters: Mapping[str, Tensor], schedule: Schedule, beside: Sequence[Group]
) -> torch.optim.AdamW:
    """The first group follows the schedule."""
    own = {"params": list(parameters.values()), "weight_decay": schedule.weight_decay}
    others = [
        {
            "params": list(group.parameters.values()),
            "lr": group.rate,
            "maximize": group.maximize,
            "weight_decay": 0.0,
        }
        for group in beside
    ]
    return torch.optim.AdamW([own, *others], betas=schedule.betas)


def _update(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    clip: float,
    step: int,
    rate: float,
    team: Team,
) -> float:
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    value = loss(step)
    total = float(team.add(value.detach().clone()))
    if not math.isfinite(total):
        raise NumericalError(
            f"the loss of training step {step} is {total}", "lower `learning_rate`"
        )
    value.backward()  # type: ignore[no-untyped-call]
    team.add_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    return total


def _save(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
    team: Team,
) -> None:
    """Weights and both moments in one file, with the losses, whose number is the step."""
    tensors = {}
    for name, parameter in parameters.items():
        kinds = {"weight": parameter} | {
            kind: optimizer.state[parameter][kind] for kind in _MOMENTS
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


def _resumed(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, team: Team
) -> tuple[list[float], float]:
    """Put a checkpoint into place; the losses so far and the seconds they took."""
    if not path.is_file():
        return [], 0.0
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        losses, seconds = json.loads(facts["losses"]), json.loads(facts["seconds"])
        expected = {f"{kind}.{name}" for name in parameters for kind in ("weight", *_MOMENTS)}
        if set(file.keys()) != expected:
            raise ResumeError(f"{path} holds the training of other parameters", "remove it")
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(team.like(parameter, file.get_tensor(f"weight.{name}")))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses))),
                **{
                    moment: team.like(parameter, file.get_tensor(f"{moment}.{name}"))
                    for moment in _MOMENTS
                },
            }
    return losses, seconds
