#!/usr/bin/env python3
"""Train the model that ships as `builtin:tiny`, and its tokenizer, on the calibration split.

    OMP_WAIT_POLICY=passive python tools/train_tiny.py [--steps 3600] [--output DIR]
    python tools/train_tiny.py --measure DIR

The first form trains on two CPU cores in about half an hour; the second prints the bits per byte
of a checkpoint on the evaluation split beside `gzip -9` of the same text. Hidden matrices are
trained with Muon, the rest with AdamW, under bfloat16 autocast with float32 master weights; the
learning rate rises linearly, stays, and falls to zero over the last part of the run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor import text

SEED = 0
VOCABULARY = 4096
BEGIN, END = "<|begin|>", "<|end|>"
LENGTH = 512
ROWS = 8  # sequences per step
PEAK_RATE = 3e-3
LOG_EVERY = 50  # steps
WARM_UP, DECAY = 0.03, 0.4  # shares of the run
MIX = {  # share of the training rows; code gets more, where gzip is strongest; speeches less
    "prose": 0.18,
    "speeches": 0.09,
    "encyclopedia": 0.18,
    "code": 0.28,
    "docs": 0.18,
    "multilingual": 0.09,
}
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "compressor" / "builtin" / "tiny"


def configuration() -> LlamaConfig:
    """Widths divide by 64 but not by 128, so that group-size rules are exercised."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=832,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the calibration split, the multilingual part thinned out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_text() -> Iterator[str]:
    for domain in MIX:
        documents = text.calibration_documents(domain)
        stride = 4 if domain == "multilingual" else 1
        yield from (document.text for document in documents[::stride])


def streams(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """One int64 token stream per domain: every document between begin and end."""
    result = {}
    for domain in MIX:
        texts = [BEGIN + d.text + END for d in text.calibration_documents(domain)]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        result[domain] = torch.tensor([token for ids in encoded for token in ids])
    return result


def draw(data: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """A batch of windows, int64 [ROWS, LENGTH + 1], with domains drawn by their share."""
    names = list(data)
    shares = torch.tensor([MIX[name] for name in names])
    rows = []
    for choice in torch.multinomial(shares, ROWS, replacement=True, generator=generator).tolist():
        stream = data[names[choice]]
        start = int(torch.randint(len(stream) - LENGTH, (1,), generator=generator))
        rows.append(stream[start : start + LENGTH + 1])
    return torch.stack(rows)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding and norms."""
    parameters = dict(model.named_parameters())
    matrices = [p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in parameters.items() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Budget:
    """When a run is over: after `steps`, or earlier when `seconds` have passed."""

    steps: int
    seconds: float

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, at least 1 when it is over."""
        return max(step / self.steps, seconds / self.seconds)


def rate(progress: float) -> float:
    """Warm-up, stable, linear decay to zero, as a share of the peak learning rate."""
    return min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / DECAY)


def loss_of(model: LlamaForCausalLM, window: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats; `window` is int64 [rows, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def train(
    model: LlamaForCausalLM, data: dict[str, Tensor], budget: Budget, log: Callable[..., None]
) -> None:
    """Run all steps; `log` gets (step, tokens, seconds, mean loss since the last call)."""
    generator = torch.Generator().manual_seed(SEED)
    chosen = optimizers(model)
    compiled = torch.compile(loss_of)  # a fifth faster: fuses norms, rotary and the loss
    started, step, progress, losses = time.perf_counter(), 0, 0.0, []
    while progress < 1:
        for group in (group for optimizer in chosen for group in optimizer.param_groups):
            group["lr"] = PEAK_RATE * rate(progress)
        loss = compiled(model, draw(data, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step, seconds = step + 1, time.perf_counter() - started
        progress = budget.progress(step, seconds)
        if step % LOG_EVERY == 0 or progress >= 1:
            log(step, step * ROWS * LENGTH, seconds, sum(losses) / len(losses))
            losses = []


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[text.Document]
) -> float:
    """Bits per UTF-8 byte: windows of LENGTH that never cross documents, each scored token
    with at least half a window of its document before it where there is as much."""
    nats, size, half = 0.0, 0, LENGTH // 2
    for document in documents:
        ids = torch.tensor(tokenizer(BEGIN + document.text, add_special_tokens=False)["input_ids"])
        size += len(document.text.encode())
        for end in range(half, len(ids) + half, half):
            window = ids[max(0, end - LENGTH) : end]
            fresh = min(half, len(ids) - (end - half)) - (end == half)
            nats += _tail_loss(model, window, fresh)
    return nats / size / math.log(2)


def _tail_loss(model: LlamaForCausalLM, window: Tensor, fresh: int) -> float:
    if fresh <= 0:
        return 0.0
    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, -fresh:].float()
    return float(nn.functional.cross_entropy(logits, window[-fresh:], reduction="sum"))


def measure(folder: Path) -> None:
    """Print bits per byte beside gzip's for every evaluation domain."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print("| domain | bits per byte | gzip -9 |\n|---|---|---|")
    for domain in text.evaluation_domains():
        documents = text.evaluation_documents(domain)
        joined = "\n\n".join(document.text for document in documents).encode()
        packed = 8 * len(gzip.compress(joined, 9, mtime=0)) / len(joined)
        print(f"| {domain} | {bits_per_byte(model, tokenizer, documents):.3f} | {packed:.3f} |")


def run(budget: Budget, output: Path, log_path: Path | None) -> None:
    """Train tokenizer and model and write the checkpoint in bfloat16."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(configuration()).train()
    rows: list[tuple[int, int, float, float]] = []

    def log(step: int, tokens: int, seconds: float, loss: float) -> None:
        rows.append((step, tokens, round(seconds, 1), round(loss, 4)))
        print(*rows[-1], flush=True)

    train(model, streams(tokenizer), budget, log)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    if log_path:
        with log_path.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "tokens", "seconds", "loss"), *rows])


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end earlier if need be")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--log", type=Path, help="write the loss curve here as CSV")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="only measure a checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(options.measure)
    else:
        run(Budget(options.steps, options.seconds), options.output, options.log)


if __name__ == "__main__":
    main()
