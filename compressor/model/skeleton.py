"""A model without weights, of which one part at a time is brought to life.

The model's own `forward` computes masks, rotary tables and everything else that differs from
family to family and from block to block. To run one block alone, the others are replaced by
the identity, the hidden states we stored are put in front of the block, and the forward is
left as soon as the block has answered. Nothing is cached or imitated. Several such forwards may
be under way at once, each standing still somewhere in the block (`passage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.model.architecture import Architecture
from compressor.model.cache import round_cache
from compressor.model.configuration import attention_implementation
from compressor.model.files import read_config
from compressor.model.inputs import round_inputs
from compressor.model.quiet import quiet


class _Reached(Exception):
    """Carries what was asked for out of the model's forward."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@contextmanager
def _refusals(checkpoint: Path) -> Iterator[None]:
    """What transformers raises of a configuration, in one sentence."""
    file = checkpoint / "config.json"
    try:
        yield
    except KeyError as error:  # a name that it looks up, say of an activation; alone it says little
        word = error.args[0]
        key = next(_holding(read_config(checkpoint), word), None)
        said = f"knows no {key} called {word!r}" if key else f"refuses it: {word}"
        raise ModelError(f"{file}: transformers {said}") from None
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{file}: transformers refuses it: {error}") from None


def _holding(config: Mapping[str, object], value: object) -> Iterator[str]:
    """Keys with a value."""
    for key, held in config.items():
        if isinstance(held, Mapping):
            yield from _holding(held, value)
        elif held == value:
            yield key


class Skeleton:
    """A causal language model on the meta device, in evaluation mode.

    Args:
        checkpoint: directory with `config.json`.
        architecture: of the same configuration.
        device: where parts are brought to life.
        dtype: in which everything is computed.

    Raises:
        ModelError: transformers refuses the configuration.
    """

    def __init__(
        self, checkpoint: Path, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        with _refusals(checkpoint), quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            self.model = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention_implementation(architecture.config),
                experts_implementation="eager",
            )
        self.model.eval().requires_grad_(False)
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.blocks_path)
        self._restore_buffers()
        self._doors = [_Door(layer) for layer in self.layers]
        round_inputs(self.model, architecture)
        round_cache(self.model, architecture)

    def share(self, other: Skeleton) -> None:
        """Have the weights of another skeleton of the same model, now and whenever they change.

        Hooks, doors and buffers stay its own: two forwards may be under way in two threads.
        """
        for mine, theirs in zip(self.model.modules(), other.model.modules(), strict=True):
            mine._parameters = theirs._parameters

    def _restore_buffers(self) -> None:
        """Compute what is no weight and not on disk, such as rotary frequencies.

        Runs the model's own initialisation, as `from_pretrained` does, on the modules concerned.
        """
        for module in self.model.modules():
            missing = [
                name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta
            ]
            for name in missing:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            if missing:
                self.model._init_weights(module)

    def assign(self, name: str, tensor: Tensor) -> None:
        """Put a weight in place; `name` is that of the module tree."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        expected = module.get_parameter(leaf).shape
        if tensor.shape != expected:
            raise ValueError(f"{name}: shape {list(tensor.shape)} instead of {list(expected)}")
        value = tensor.to(self.device, self.dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def release(self, module: nn.Module) -> None:
        """Send all weights of a module back to the meta device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def parameter(self, name: str) -> Tensor:
        """A weight that is in place."""
        parameter: Tensor = self.model.get_parameter(name)
        return parameter

    def embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What enters block 0: [batch, length, hidden]; needs the embedding in place."""

        def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        with _hook(self.layers[0].register_forward_pre_hook, reached):
            return self._jump(input_ids=input_ids.to(self.device), mask=mask)

    def block(self, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Output of block `index`, which is in place, for an input [batch, length, hidden]."""
        self._doors[index].guest = hidden.to(self.device, self.dtype)
        return self._jump(shape=hidden.shape[:2], mask=mask)

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """From the last block's output to what enters the head: [batch, length, width]."""
        hidden = hidden.to(self.device, self.dtype)

        def reached(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            raise _Reached(args[0])

        with (
            self._doors[-1].answering(hidden),
            _hook(self.head.register_forward_pre_hook, reached),
        ):
            return self._jump(shape=hidden.shape[:2], mask=mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Head and whatever the family does to logits: [..., width] to [..., vocab]."""
        hidden = hidden.to(self.device, self.dtype)

        def substitute(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> Any:
            return (hidden,), kwargs

        with _hook(self.head.register_forward_pre_hook, substitute):
            output = self.model(inputs_embeds=self._zeros(torch.Size((1, 1))), use_cache=False)
            logits: Tensor = output.logits
            return logits

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def embedding(self) -> nn.Module:
        """The module that turns token ids into vectors."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def _zeros(self, shape: torch.Size) -> Tensor:
        """Stand-ins for embeddings [batch, length, width] where their values do not matter.

        One zero seen many times: a forward that stands still holds on to them.
        """
        width = self.embedding.get_parameter("weight").shape[1]
        return torch.zeros((), device=self.device, dtype=self.dtype).expand(*shape, width)

    def _jump(
        self, mask: Tensor, input_ids: Tensor | None = None, shape: torch.Size | None = None
    ) -> Tensor:
        """Start the model's forward and come back with what a hook reached."""
        inputs: Mapping[str, Tensor] = (
            {"inputs_embeds": self._zeros(shape)} if shape is not None else {"input_ids": input_ids}  # type: ignore[dict-item]
        )
        # Without padding no mask is passed, so that fused causal attention can be used.
        attention = None if bool(mask.all()) else mask.to(self.device, torch.int64)
        try:
            self.model(**inputs, attention_mask=attention, use_cache=False)
        except _Reached as reached:
            return reached.value
        raise RuntimeError("the forward ended without reaching the part that was asked for")


class _Door:
    """Stands in for a layer's forward: hidden states pass unchanged, unless a guest is announced.

    Args:
        layer: from now on it does what the door does; an attribute goes before a method.

    Attributes:
        guest: hidden states with which the next call runs the layer's own forward, whose answer
            then leaves the model's forward at once.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._own: Callable[..., Any] = layer.forward
        self._layer = layer
        self.guest: Tensor | None = None
        layer.forward = self._pass

    def _pass(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.guest is None:
            return hidden_states
        hidden_states, self.guest = self.guest, None
        output = self._own(hidden_states, *args, **kwargs)
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def answering(self, hidden: Tensor) -> Iterator[None]:
        """Let the layer answer with these hidden states, whatever enters it."""
        self._layer.forward = lambda *_, **__: hidden
        try:
            yield
        finally:
            self._layer.forward = self._pass


@contextmanager
def _hook(
    register: Callable[..., torch.utils.hooks.RemovableHandle], hook: Callable[..., Any]
) -> Iterator[None]:
    handle = register(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
