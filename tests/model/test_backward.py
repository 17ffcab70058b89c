"""Walking back: gradients block by block are those of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ResumeError
from compressor.model.backward import Gradients
from compressor.model.experts import place
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
    gradients, layers = Gradients(walk), walk.architecture.layers
    generator = torch.Generator().manual_seed(seed)
    gradients.save(
        layers,
        [
            gradients.sampled(batch, hidden, generator, observe)
            for batch, hidden in enumerate(walk.outputs())
        ],
    )
    for index in reversed(range(layers)):
        block = walk.kept(index)
        gradients.pass_through(block, observe)
        walk.release(block)
    return seen, list(gradients.at(0))


def differentiated(model: nn.Module, batches: Sequence[TokenBatch]) -> Iterator[TokenBatch]:
    """Each batch after the likelihood of tokens drawn for it has gone backward through a model."""
    generator = torch.Generator().manual_seed(5)
    for batch in batches:
        logits = model(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
        chances = torch.log_softmax(logits[batch.mask].float(), -1)
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=generator)
        chances.gather(-1, drawn).sum().backward()
        yield batch


def whole(folder: Path, batches: tuple[TokenBatch, ...], walk: BlockWalk) -> Seen:
    """The same by one backward pass through the model as transformers loads it."""
    model = load_model(folder)
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = (args[0].detach(), output)

        return keep

    names = [m.name for m in walk.architecture.matrices if m.block is not None and m.expert is None]
    for name in names:
        path = walk.architecture.module_tensor(f"{name}.weight").removesuffix(".weight")
        model.get_submodule(path).register_forward_hook(listen(name))
    seen: Seen = defaultdict(list)
    for batch in differentiated(model, batches):
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
        Gradients(first).at(2)
    _, before = streamed(first)
    again = BlockWalk(folder, BATCHES, scratch=tmp_path)
    again.keep()
    assert all(torch.equal(a, b) for a, b in zip(Gradients(again).at(0), before, strict=True))
    other = BlockWalk(folder, BATCHES[:1], scratch=tmp_path)
    with pytest.raises(ResumeError, match="another text"):
        Gradients(other).at(0)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe-mixed"])
def test_gradients_of_experts_are_those_of_their_weights(
    variant: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Σ g xᵀ over the tokens of an expert is the gradient of its part of the fused weights."""
    folder = checkpoints(variant)
    walk = BlockWalk(folder, BATCHES, scratch=tmp_path)
    seen, _ = streamed(walk)
    model = load_model(folder).requires_grad_()
    list(differentiated(model, BATCHES))
    experts = [m for m in walk.architecture.matrices if m.expert is not None]
    assert not any(".gate." in name or name.endswith(".gate") for name in seen)  # no routers
    reached = 0
    for matrix in experts:
        spot = place(walk.architecture, matrix)
        expected = spot.view(model.get_parameter(spot.parameter).grad)
        found = sum((g.T @ x for x, g in seen.get(matrix.name, [])), torch.zeros(matrix.shape))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        reached += matrix.name in seen
    assert reached > len(experts) / 2


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite", "gpt2", "opt-postnorm"])
def test_gradients_of_lookups_are_those_of_the_embedding(
    variant: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Summed by token they are the gradient of the table in its use as an embedding."""
    folder = checkpoints(variant)
    walk = BlockWalk(folder, BATCHES, scratch=tmp_path)
    streamed(walk)
    model = load_model(folder).requires_grad_()
    module = model.get_input_embeddings()
    table = torch.nn.Parameter(module.weight.detach().clone())
    module.weight = table  # apart from a tied head
    list(differentiated(model, BATCHES))
    found = torch.zeros_like(table)
    for place_, batch in enumerate(BATCHES):
        rows = Gradients(walk).of_lookups(place_, Gradients(walk).at(0)[place_])
        found.index_add_(0, batch.input_ids[batch.mask], rows)
    padding = torch.cat([batch.input_ids[~batch.mask] for batch in BATCHES]).unique()
    keep = torch.ones(len(table), dtype=torch.bool)
    keep[padding] = False  # what padding looks up reaches no prediction but its own
    torch.testing.assert_close(found[keep], table.grad[keep], rtol=1e-3, atol=1e-5)


def test_predictions_are_those_of_the_whole_model(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoints("gemma2")
    walk = BlockWalk(folder, BATCHES, scratch=tmp_path)
    walk.keep()
    found = torch.cat([logits for _, logits in walk.predictions()])
    model = load_model(folder)
    expected = [
        model(batch.input_ids, attention_mask=batch.mask.long()).logits[batch.mask]
        for batch in BATCHES
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
