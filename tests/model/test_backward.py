"""Walking back: gradients block by block are those of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ResumeError
from compressor.model.load import load_model
from compressor.model.walk import BlockWalk
from compressor.types import TokenBatch
from tests.model.test_walk import BATCHES

Seen = dict[str, list[tuple[Tensor, Tensor]]]


def streamed(walk: BlockWalk, seed: int = 5) -> tuple[Seen, list[Tensor]]:
    """What every matrix sees, and the gradients of what enters the first block."""
    seen: Seen = defaultdict(list)

    def observe(name: str, inputs: Tensor, gradients: Tensor) -> None:
        seen[name].append((inputs, gradients))

    walk.keep()
    layers = walk.architecture.layers
    generator = torch.Generator().manual_seed(seed)
    walk.save_gradients(
        layers,
        [
            walk.sampled_gradient(batch, hidden, generator, observe)
            for batch, hidden in enumerate(walk.outputs())
        ],
    )
    for index in reversed(range(layers)):
        block, upstream = walk.kept(index), walk.gradients(index + 1)
        walk.save_gradients(
            index, [block.backward(b, upstream[b], observe) for b in range(len(upstream))]
        )
        walk.release(block)
    return seen, list(walk.gradients(0))


def whole(folder: Path, batches: tuple[TokenBatch, ...], walk: BlockWalk) -> Seen:
    """The same by one backward pass through the model as transformers loads it."""
    model = load_model(folder)
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = (args[0].detach(), output)

        return keep

    names = [m.name for m in walk.architecture.matrices if m.block is not None]
    for name in names:
        path = walk.architecture.module_tensor(f"{name}.weight").removesuffix(".weight")
        model.get_submodule(path).register_forward_hook(listen(name))
    generator = torch.Generator().manual_seed(5)
    seen: Seen = defaultdict(list)
    for batch in batches:
        logits = model(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
        chances = torch.log_softmax(logits[batch.mask].float(), -1)
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=generator)
        chances.gather(-1, drawn).sum().backward()
        for name, (inputs, output) in outputs.items():
            assert output.grad is not None
            flat = (t.reshape(-1, t.shape[-1])[batch.mask.flatten()] for t in (inputs, output.grad))
            seen[name].append(tuple(flat))  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt2", "gpt_neox", "granite", "qwen2"])
def test_gradients_are_those_of_the_whole_model(
    variant: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoints(variant)
    walk = BlockWalk(folder, BATCHES, scratch=tmp_path)
    seen, entered = streamed(walk)
    expected = whole(folder, BATCHES, walk)
    assert len(seen["head"]) >= len(BATCHES)
    assert set(expected) == set(seen) - {"head"}
    for name, pairs in expected.items():
        for (x, g), (inputs, gradients) in zip(pairs, seen[name], strict=True):
            torch.testing.assert_close(inputs, x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients, g, rtol=1e-3, atol=1e-5)
    for batch, gradient in zip(BATCHES, entered, strict=True):
        assert gradient.shape[:2] == batch.mask.shape
        assert not gradient[~batch.mask].any()


def test_an_interrupted_walk_finds_what_it_kept(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoints("llama")
    first = BlockWalk(folder, BATCHES, scratch=tmp_path)
    with pytest.raises(ResumeError):
        first.gradients(2)
    _, before = streamed(first)
    again = BlockWalk(folder, BATCHES, scratch=tmp_path)
    again.keep()
    assert all(torch.equal(a, b) for a, b in zip(again.gradients(0), before, strict=True))
    other = BlockWalk(folder, BATCHES[:1], scratch=tmp_path)
    with pytest.raises(ResumeError, match="another text"):
        other.gradients(0)
