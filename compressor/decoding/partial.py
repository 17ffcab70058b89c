"""A model that computes its first blocks now and the others later.

Each block's `forward` is exchanged for the time of one pass, so that embedding, norms, head and the
model's own loop stay as they are, whatever its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """A block that is skipped."""
    return hidden_states


@contextmanager
def leaving_after(blocks: Sequence[nn.Module], count: int, kept: list[Tensor]) -> Iterator[None]:
    """Within, a pass computes the first `count` blocks only, and appends their outputs to `kept`.

    Args:
        blocks: of the model, in order.
        count: blocks that are computed.
        kept: receives [B, n, H] for each of them.
    """

    def keeping(forward: Forward) -> Forward:
        def run(*inputs: Any, **options: Any) -> Any:
            found = forward(*inputs, **options)
            kept.append(found)
            return found

        return run

    computed = [keeping(block.forward) for block in blocks[:count]]
    with _exchanged(blocks, [*computed, *[_unchanged] * (len(blocks) - count)]):
        yield


@contextmanager
def going_on_from(blocks: Sequence[nn.Module], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Within, the first blocks give what they gave before, and only the others compute.

    Args:
        blocks: of the model, in order.
        outputs: of as many first blocks as there are entries, each [B, n, H].
    """

    def repeating(output: Tensor) -> Forward:
        return lambda *_, **__: output

    with _exchanged(blocks, [repeating(output) for output in outputs]):
        yield


@contextmanager
def _exchanged(blocks: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    own = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=False):
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                vars(block)["forward"] = before
