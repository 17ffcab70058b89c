"""A look at a checkpoint on a short text: enough to see that it loads and is what it should be."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from compressor.evaluation.scoring import Scorer
from compressor.evaluation.session import Session
from compressor.machine import free_memory
from compressor.model.load import load_model
from compressor.model.memory import memory_returned
from compressor.progress import SilentObserver
from compressor.types import TokenBatch

_TOKENS = 256


@dataclass(frozen=True)
class Probe:
    """The first tokens of the evaluation text, and the ways to run a checkpoint on them.

    Attributes:
        session: whose text and device are used.
        whole_bytes: memory of the model in the precision it is stored in.
    """

    session: Session
    whole_bytes: int

    def streamed(self, checkpoint: Path) -> Tensor:
        """Logits [tokens, vocabulary] on the CPU, computed with one block in memory at a time."""
        scorer: Scorer = replace(self.session, observer=SilentObserver()).scorer(checkpoint)
        batch = TokenBatch(self._ids, torch.ones_like(self._ids, dtype=torch.bool), ("probe",))
        (states,) = scorer.states([batch])
        return scorer.logits(states[0].to(scorer.device)).cpu()

    def whole(self, checkpoint: Path) -> Tensor | None:
        """The same from the model as anyone would load it; None if memory does not hold it."""
        if _free(self.session.device) < self.whole_bytes:
            return None
        gc.collect()  # an unpacked model hangs in cycles of its own
        with memory_returned():
            model = load_model(checkpoint, self.session.device)
            with torch.inference_mode():
                logits: Tensor = model(self._ids.to(self.session.device)).logits[0]
        return logits.cpu()

    @cached_property
    def _ids(self) -> Tensor:
        # The last token of a window is only predicted: the model may have no position for it.
        window = self.session.settings.text.windows[0].tokens[:-1]
        return torch.as_tensor(window[:_TOKENS])[None]


def _free(device: torch.device) -> int:
    """Bytes that a model can take on its way to `device`."""
    if device.type != "cuda":
        return free_memory()
    free: int = torch.cuda.mem_get_info(device)[0]
    return min(free, free_memory())
