"""The work of `draft.eagle3`: vocabulary, training-time test, two dialects on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Corpus, Head
from compressor.decoding.eagle3 import (
    WEIGHTS,
    Eagle3,
    Eagle3Draft,
    draft_vocabulary,
    layer_config,
    load_eagle3,
    start_from_target,
    unroll,
)
from compressor.decoding.probes import Probes, probe_steps
from compressor.formats.atomic import atomic_write_json
from compressor.formats.eagle3 import flat_config, speculators_config, speculators_tensors
from compressor.formats.shards import save_tensors
from compressor.model.architecture import Architecture
from compressor.model.load import load_tokenizer, read_config
from compressor.model.precision import trains_in_half
from compressor.numerics.distillation import ROWS, teach, truncated
from compressor.stages.context import StageContext
from compressor.stages.drafting import (
    PROBES,
    finish,
    half_products,
    load_target,
    read_corpus,
    train,
)
from compressor.types import StageResult

if TYPE_CHECKING:
    from compressor.stages.draft_eagle3 import DraftEagle3


def distil_eagle3(
    config: DraftEagle3, checkpoint: Path, calibration: CalibrationSet, context: StageContext
) -> StageResult:
    """Train an EAGLE-3 head; the target's checkpoint is only read.

    Args:
        config: options.
        checkpoint: the target.
        calibration: text.
        context: `folder` receives the draft.
    """
    target = load_target(config, checkpoint, context)
    sizes = Architecture.from_config(read_config(checkpoint))
    layers = config.layers(sizes.layers)
    corpus = read_corpus(config, target, checkpoint, layers, calibration, context)
    half = trains_in_half(config.precision, context.device)
    whole = Head.of(target, torch.bfloat16 if half else torch.float32)
    said = likeliest(corpus, whole)
    counts = sum((row[row >= 0].bincount(minlength=sizes.vocab) for row in said),
                 torch.zeros(sizes.vocab, dtype=torch.int64))  # fmt: skip
    context.team.add(counts)
    ids = draft_vocabulary(counts, config.draft_vocab(sizes.vocab)).to(context.device)
    head = _begin(config, target, ids)
    lesson = Lesson(config, head, corpus, whole.rows(ids), said)
    probes = Probes(
        CachedModel(target, layers),
        load_tokenizer(checkpoint),
        lambda: Eagle3Draft(head, layers),
        config.drafted,
        probe_steps(config.steps, config.probes),
        context.scratch / PROBES,
    )
    done = train(
        config, dict(head.named_parameters()), lesson.loss, probes, context, (head.lm_head.weight,)
    )
    if context.team.leads:
        _save(head, config, sizes, checkpoint, context.folder, layers)
    notes = {
        "draft_vocabulary": float(len(ids)),
        "draft_vocabulary_coverage": float(counts[ids.cpu()].sum() / counts.sum()),
    }
    return finish(
        config, "eagle3", target, checkpoint, corpus, done, probes, context, layers, notes
    )


def likeliest(corpus: Corpus, head: Head) -> list[Tensor]:
    """The target's most likely next token at every place, by batch, int64 [B, T]; -1 on padding.

    A few places at a time, since this takes the whole vocabulary.
    """
    found = []
    for number in range(len(corpus.batches)):
        hidden = corpus.hidden(number)
        parts = torch.split(hidden.flatten(0, 1), ROWS)
        said = torch.cat([head.logits(part).argmax(-1) for part in parts])
        said = said.view(hidden.shape[:2]).masked_fill(~corpus.mask(number), -1)
        found.append(said.cpu())
    return found


class Lesson:
    """The loss of a training step.

    Args:
        config: loss and unrolling.
        head: trained.
        corpus: tokens, features and what the target's head read.
        rows: the target's head on the draft's vocabulary.
        said: from `likeliest`; places where the target says what the draft cannot do not count.
    """

    def __init__(
        self, config: DraftEagle3, head: Eagle3, corpus: Corpus, rows: Head, said: Sequence[Tensor]
    ) -> None:
        self.config, self.head, self.corpus, self.rows, self.said = config, head, corpus, rows, said
        vocab = head.config.vocab_size
        self.known = torch.zeros(vocab, dtype=torch.bool, device=head.ids.device)
        self.known[head.ids] = True

    def loss(self, step: int) -> Tensor:
        """Σ decay^j · mean divergence of step j, over the steps' weights."""
        corpus, config = self.corpus, self.config
        number = corpus.at(step, config.seed)
        tokens, hidden = corpus.ids(number), corpus.hidden(number)
        counts = corpus.mask(number) & self.known[self.said[number].to(self.known.device)]
        with half_products(config, tokens.device):
            unrolled = unroll(self.head, corpus.features(number), tokens, config.ttt_steps)
        teacher = self._teacher(hidden)
        places = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
        total = torch.zeros((), device=tokens.device)
        for place, states in enumerate(unrolled):
            later = slice(1 + place, None)
            part = teach(
                self.head.norm(states).flatten(0, 1),
                self.head.lm_head.weight,
                teacher,
                places[:, later].flatten(),
                counts[:, later].flatten(),
                config.loss,
                total=corpus.team.add,
            )
            total = total + config.decay**place * part
        return total / sum(config.decay**place for place in range(config.ttt_steps))

    @torch.no_grad()
    def _teacher(self, hidden: Tensor) -> Tensor:
        """What the target says at every place, on the draft's vocabulary [B · T, V_d]."""
        parts = []
        for states in torch.split(hidden.flatten(0, 1), ROWS):
            logits = self.rows.logits(states)
            p = truncated(logits.float().softmax(-1), self.config.top_k)
            parts.append(p.to(logits.dtype))
        return torch.cat(parts)


def _begin(config: DraftEagle3, target: Any, ids: Tensor) -> Eagle3:
    """The head before training."""
    table = target.get_input_embeddings().weight.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = Eagle3(layer_config(target), ids, table).to(ids.device)
    if config.start == "target":
        layers = config.layers(target.config.get_text_config().num_hidden_layers)
        start_from_target(head, target, Head.of(target).rows(ids), layers.index(max(layers)))
    return head


def _save(
    head: Eagle3,
    config: DraftEagle3,
    sizes: Architecture,
    checkpoint: Path,
    folder: Path,
    layers: Sequence[int],
) -> None:
    """The flat dialect in `folder`, the other one in a folder below it."""
    dtype = getattr(torch, sizes.dtype)
    tensors = {name: value.detach().to("cpu", dtype) for name, value in head.named_parameters()}
    ids = head.ids.cpu()
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(sizes.vocab, dtype=torch.bool).scatter_(0, ids, True)
    layer = head.config.to_diff_dict() | {"dtype": sizes.dtype}
    verifier = {
        "name_or_path": checkpoint.name,
        "architectures": read_config(checkpoint).get("architectures"),
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    atomic_write_json(folder / "config.json", flat_config(layer, len(ids), sizes.layers, layers))
    other = folder / "speculators"
    save_tensors(other / WEIGHTS, speculators_tensors(tensors), {"format": "pt"})
    atomic_write_json(
        other / "config.json",
        speculators_config(layer, len(ids), layers, config.drafted, verifier),
    )


def untrained_eagle3(config: DraftEagle3, target: Any, folder: Path) -> Eagle3Draft:
    """The head before training, on the vocabulary of the one in `folder`."""
    trained = load_eagle3(folder, target, config.layers(target.config.num_hidden_layers))
    head = _begin(config, target, trained.head.ids)
    return Eagle3Draft(head.eval(), trained.layers)
