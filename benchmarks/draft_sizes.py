#!/usr/bin/env python3
"""What a draft would gain on targets of other sizes: a model, checked against one measurement.

    python benchmarks/draft_sizes.py [--wanted 1.4]

Costs are those of `predicted_costs`: passes take the time of reading weights and of multiplying by
them. The share of the products is fitted to what `drafts_smollm2.py` measured on SmolLM2 (fp32, two
threads); 0 stands for machines that multiply for nothing, as accelerators nearly do at batch 1.
Acceptance is that of the same measurement for all sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from compressor.model.architecture import Architecture
from compressor.numerics.speculative import (
    acceptance_length,
    best_drafted,
    expected_length,
    predicted_costs,
    products_share,
)
from compressor.stages.draft_eagle3 import DraftEagle3

# benchmarks/results/drafts-smollm2.md
ACCEPTED = (0.41, 0.15, 0.08, 0.03, 0.01)
COST, VERIFY = 0.063, (1.14, 1.19, 1.56, 1.63, 1.69)

# hidden, feed-forward, blocks, heads, heads of keys, vocabulary; all tie embedding and head but 8B
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "SmolLM2-360M": (960, 2560, 32, 15, 5, 49152),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
}


def architecture(name: str) -> Architecture:
    """Of one of `SHAPES`."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[name]
    return Architecture.from_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": name != "Llama-3.1-8B",
            "dtype": "bfloat16",
        }
    )


def weights(shape: Architecture) -> tuple[float, float, float]:
    """Read by a pass of the target, a step of an EAGLE-3 head and one of a draft of one block."""
    head = shape.vocab * shape.hidden
    blocks = sum(matrix.parameters for matrix in shape.matrices if matrix.block is not None)
    fusion = 3 * shape.hidden**2  # once for every pass, not for every step
    eagle = DraftEagle3().parameters(shape) - fusion
    one = sum(matrix.parameters for matrix in shape.block(0)) + head
    return blocks + head, eagle, one


def needed(wanted: float, cost: float, verify: tuple[float, ...]) -> tuple[float, int, float]:
    """Least acceptance of a token, each alike, for a speed-up; γ and τ there."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        found = [middle**place for place in range(1, len(verify) + 1)]
        enough = best_drafted(found, cost, verify)[1] >= wanted
        low, high = (low, middle) if enough else (middle, high)
    drafted = best_drafted([high**place for place in range(1, len(verify) + 1)], cost, verify)[0]
    return high, drafted, expected_length(high, drafted)


def rows(wanted: float, share: float) -> Iterator[str]:
    """A line of the table for every shape and kind of draft."""
    for name in SHAPES:
        target, *drafts = weights(architecture(name))
        for kind, draft in zip(("EAGLE-3", "one block"), drafts, strict=True):
            cells = [name, kind, f"{target / 1e6:.0f}", f"{draft / 1e6:.0f}"]
            cells.append(f"{draft / target:.3f}")
            for assumed in (share, 0.0):
                cost, verify = predicted_costs(target, draft, len(ACCEPTED), assumed)
                drafted, gain = best_drafted(ACCEPTED, cost, verify)
                rate, most, length = needed(wanted, cost, verify)
                cells += [f"{gain:.2f} ({drafted})", f"{rate:.2f}: {length:.2f} ({most})"]
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the check and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wanted", type=float, default=1.4)
    wanted = parser.parse_args().wanted
    share = products_share(VERIFY)
    target, eagle, _ = weights(architecture("SmolLM2-135M"))
    cost, verify = predicted_costs(target, eagle, len(VERIFY), share)
    print(f"Products are {share:.3f} of a plain step.")
    print(f"c: {cost:.3f} for {COST:.3f} measured; v: ", end="")
    print(
        ", ".join(f"{ours:.2f} for {seen:.2f}" for ours, seen in zip(verify, VERIFY, strict=True))
    )
    for name, costs in (("measured", (COST, VERIFY)), ("predicted", (cost, verify))):
        drafted, gain = best_drafted(ACCEPTED, *costs)
        length = acceptance_length(ACCEPTED[:drafted])
        print(f"From {name} costs: {gain:.2f} at γ = {drafted}, τ = {length:.2f}")
    print("\n".join(rows(wanted, share)))


if __name__ == "__main__":
    main()
