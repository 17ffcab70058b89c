"""A report with the numbers of a plausible run: a base, a pruned and a quantized variant."""

from __future__ import annotations

import hashlib
import math
import random

from compressor.decoding.results import (
    Acceptance,
    CurvePoint,
    DomainSpeed,
    DraftDomain,
    DraftMeasurement,
    DraftSpeed,
    LearningCurve,
    LogFit,
    Outlook,
)
from compressor.evaluation.results import (
    Contamination,
    Divergence,
    Estimate,
    Evaluation,
    GateVerdict,
    Protocol,
    Score,
    WorstDomain,
    WorstToken,
)
from compressor.report.build import build_report
from compressor.report.schema import (
    Artifact,
    Base,
    Draft,
    Environment,
    Facts,
    FileHash,
    Hardware,
    LayerMetric,
    Mixture,
    MixturePoint,
    Report,
    Reproduce,
    RoleBytes,
    Run,
    Size,
    StageFacts,
    StageFallback,
    Variant,
)

PARAMS = 134_515_008
DOMAINS = {
    "prose": (0.902, 0.021, True),
    "code": (0.641, 0.038, True),
    "mathematics": (0.873, 0.031, False),
    "dialogue": (1.012, 0.019, True),
    "encyclopedia": (0.804, 0.016, True),
    "french": (1.164, 0.052, False),
}
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
RECIPE = """\
calibration: {mix: general, samples: 256, length: 2048}
stages:
  - method: prune.depth
    keep: 28
  - method: quantize.gptq
    bits: 4
    group_size: 64
evaluate: {suite: standard}
gates: {worst_domain_delta_bits_per_byte: 0.08}
export: {format: compressed-tensors}
"""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half * 1.1)


def divergence(mean: float) -> Divergence:
    """Log-normal tails with the given mean."""
    spread = 1.9
    centre = math.log(mean) - spread**2 / 2

    def quantile(z: float) -> float:
        return math.exp(centre + spread * z)

    steps = [i / 10 for i in range(-20, 40)]
    ccdf = [(quantile(z), 0.5 * math.erfc(z / math.sqrt(2))) for z in steps]
    return Divergence(
        mean=estimate(mean, mean * 0.08),
        median=quantile(0),
        p90=quantile(1.282),
        p95=quantile(1.645),
        p99=quantile(2.326),
        p999=quantile(3.09),
        maximum=quantile(4.1),
        minimum=quantile(-4.1),
        reverse_mean=mean * 1.07,
        top1_agreement=estimate(1 - 0.9 * math.sqrt(mean) / 2, 0.004),
        flips=round(60_000 * 0.45 * math.sqrt(mean)),
        delta_p_rms=0.21 * math.sqrt(mean),
        ccdf=ccdf,
    )


def score(domain: str, factor: float, documents: int = 48) -> Score:
    level, delta, calibrated = DOMAINS[domain]
    shift = delta * factor
    tokens = 9_000 + 700 * len(domain)
    bits_per_byte = level + shift
    per_token = 4.1 * math.log(2)
    half = 0.08 + 0.12 * shift
    return Score(
        documents=documents,
        tokens=tokens,
        bytes=round(tokens * 4.1),
        in_calibration=calibrated,
        perplexity=estimate(math.exp(bits_per_byte * per_token), 0.6),
        bits_per_byte=estimate(bits_per_byte, 0.035),
        delta_bits_per_byte=estimate(shift, half * 0.06) if factor else None,
        delta_perplexity_ratio=estimate(math.exp(shift * per_token), 0.01) if factor else None,
        divergence=divergence(shift * 1.6) if factor else None,
    )


def overall(domains: dict[str, Score], factor: float) -> Score:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    scores = list(domains.values())
    level = mean([s.bits_per_byte.value for s in scores])
    shift = factor * mean([d for _, d, _ in DOMAINS.values()])
    return Score(
        documents=sum(s.documents for s in scores),
        tokens=sum(s.tokens for s in scores),
        bytes=sum(s.bytes for s in scores),
        in_calibration=None,
        perplexity=estimate(math.exp(level * 4.1 * math.log(2)), 0.3),
        bits_per_byte=estimate(level, 0.018),
        delta_bits_per_byte=estimate(shift, 0.0031) if factor else None,
        delta_perplexity_ratio=estimate(math.exp(shift * 2.84), 0.006) if factor else None,
        divergence=divergence(shift * 1.6) if factor else None,
    )


def worst_tokens(factor: float) -> list[WorstToken]:
    rows = [
        ("code", "requests/api.py", "def get(url, params=None, **kwargs):\n    return ", "request"),
        ("french", "candide-07", "La vieille lui dit : « Prenez courage, suivez-", "moi"),
        ("mathematics", "euclid-i-47", "the square on the side subtending the right ", "angle"),
        ("dialogue", "<b>t-12</b>", "A: Is that | all?\tB: No & never <i>", "again"),
    ]
    return [
        WorstToken(
            domain=domain,
            document=document,
            context=context,
            token=token,
            base_probability=0.92 - 0.07 * i,
            variant_probability=0.013 * (i + 1),
            variant_top=" the",
            kl=3.2 * factor - 0.31 * i,
        )
        for i, (domain, document, context, token) in enumerate(rows)
    ]


def protocol(limit: int | None = None) -> Protocol:
    return Protocol(
        id="rolling",
        length=2048,
        stride=512,
        bos="prefix",
        suite="standard",
        text_sha256=digest("text"),
        tokenizer_sha256=digest("tokenizer"),
        dtype="float32",
        backend="torch 2.13.0 cpu",
        batch=4,
        documents_limit=limit,
    )


def evaluation(variant: str, factor: float) -> Evaluation:
    domains = {name: score(name, factor) for name in DOMAINS}
    if factor:  # one domain that cannot be told from zero
        domains["encyclopedia"] = domains["encyclopedia"].model_copy(
            update={"delta_bits_per_byte": estimate(0.0011 * factor, 0.004)}
        )
    whole = overall(domains, factor)
    french = domains["french"]
    worst = None
    if factor and french.delta_bits_per_byte and french.divergence:
        worst = WorstDomain(
            domain="french",
            delta_bits_per_byte=french.delta_bits_per_byte,
            kl_domain="french",
            kl=french.divergence.mean,
        )
    decay = [(0, 1.9), (8, 1.5), (32, 1.2), (128, 1.0), (512, 0.92), (1024, 0.9), (1536, 0.91)]
    return Evaluation(
        variant=variant,
        protocol=protocol(),
        overall=whole,
        domains=domains,
        worst=worst,
        worst_tokens=worst_tokens(factor) if factor else [],
        kl_by_position=[(at, whole.divergence.mean.value * k) for at, k in decay]
        if whole.divergence
        else [],
        seconds=412.0 + 10 * factor,
        peak_bytes=1_912_000_000,
    )


def layer_metrics(blocks: int = 28) -> tuple[LayerMetric, ...]:
    rng = random.Random(7)
    rows = []
    for block in range(blocks):
        for place, matrix in enumerate(MATRICES):
            level = 4e-4 * (1 + place) * (1 + 3 * math.exp(-block / 3) + (block / blocks) ** 2)
            baseline = level * rng.uniform(1.6, 3.4)
            rows.append(
                LayerMetric(
                    module=f"model.layers.{block}.{matrix}",
                    bits=4.25,
                    loss=level * rng.uniform(0.85, 1.15),
                    baseline_loss=baseline,
                )
            )
    return tuple(rows)


def size(on_disk: int, tensors: int, roles: RoleBytes, nominal: float, linear: float) -> Size:
    return Size(
        bytes_on_disk=on_disk,
        tensor_bytes=tensors,
        by_role=roles,
        bits_nominal=nominal,
        bits_linear=linear,
        bits_checkpoint=8 * tensors / PARAMS,
        ratio_total=271_403_118 / on_disk,
        kv_bytes_per_token=23_040,
    )


def variants() -> tuple[Variant, ...]:
    embeddings = 56_623_104
    base = Variant(
        id="base",
        label="Base",
        parent=None,
        stage=None,
        size=size(
            271_403_118,
            269_030_016,
            RoleBytes(embeddings=embeddings, rest=269_030_016 - embeddings),
            16,
            16,
        ),
    )
    pruned = Variant(
        id="1-prune-depth",
        label="Depth 28",
        parent="base",
        stage=StageFacts(
            method="prune.depth",
            params={"keep": 28, "score": "angular"},
            seconds=71.4,
            peak_bytes=1_310_000_000,
            notes={"blocks_removed": 2},
            mixture=mixture(),
        ),
        size=size(
            257_243_998,
            254_870_896,
            RoleBytes(embeddings=embeddings, rest=254_870_896 - embeddings),
            16,
            16,
        ),
    )
    return base, pruned, quantized(embeddings)


def mixture() -> Mixture:
    """Code leads and gains, the others give."""
    points = []
    for place in range(90):
        lean = 0.2 * place / 89
        shares = {name: (1 - lean) / len(DOMAINS) for name in DOMAINS}
        shares["code"] += lean
        losses = {name: 0.3 + level - place / 200 for name, (level, _, _) in DOMAINS.items()}
        points.append(MixturePoint(at=10 * place, shares=shares, losses=losses))
    return Mixture(unit="update", points=tuple(points))


def quantized(embeddings: int) -> Variant:
    codes, scales, rest = 49_545_216, 3_096_576, 66_432
    tensors = codes + scales + rest + embeddings
    return Variant(
        id="2-quantize-gptq",
        label="Depth 28 + GPTQ W4 g64",
        parent="1-prune-depth",
        stage=StageFacts(
            method="quantize.gptq",
            params={"bits": 4, "group_size": 64, "symmetry": "symmetric", "damping": 0.01},
            seconds=508.2,
            peak_bytes=2_480_000_000,
            metrics_per_module=layer_metrics(),
            fallbacks=(
                StageFallback(
                    module="model.layers.3.mlp.down_proj",
                    reason="the Hessian was not positive definite",
                    action="damping raised from 0.01 to 0.1",
                ),
            ),
            notes={"mean_layer_loss": 0.0021},
        ),
        size=size(
            tensors + 2_391_004,
            tensors,
            RoleBytes(codes=codes, scales=scales, embeddings=embeddings, rest=rest),
            4,
            4.25,
        ),
        artifact=Artifact(
            path="artifacts/2-quantize-gptq",
            format="compressed-tensors (pack-quantized)",
            sha256=digest("artifact"),
            reload_ok=True,
            max_logit_difference=0.0,
        ),
        load_snippets={
            "transformers": "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("artifacts/2-quantize-gptq")',
            "vLLM": "vllm serve artifacts/2-quantize-gptq",
        },
    )


def facts() -> Facts:
    return Facts(
        run=Run(
            id="20261121-0712-a3f9",
            status="finished",
            command="compress recipes/prune-w4.yaml HuggingFaceTB/SmolLM2-135M",
            started="2026-11-21T07:12:09Z",
            seconds=1843.0,
            recipe=RECIPE,
            recipe_sha256=digest(RECIPE),
            seed=0,
            resumed=1,
        ),
        env=Environment(
            package="0.1.0",
            commit="738b4ca",
            python="3.11.9",
            torch="2.13.0+cpu",
            transformers="5.23.0",
            compressed_tensors="0.20.0",
            device="cpu",
            hardware=Hardware(cpu="AMD EPYC 7B13", cores=2, memory_bytes=16_900_000_000),
            deterministic=True,
        ),
        base=Base(
            id="HuggingFaceTB/SmolLM2-135M",
            revision="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            licence="apache-2.0",
            family="llama",
            logical_params=PARAMS,
            files=(
                FileHash(path="config.json", sha256=digest("config"), bytes=704),
                FileHash(path="model.safetensors", sha256=digest("model"), bytes=269_060_552),
            ),
        ),
        variants=variants(),
        evaluations={
            "base": evaluation("base", 0.0),
            "1-prune-depth": evaluation("1-prune-depth", 0.6),
            "2-quantize-gptq": evaluation("2-quantize-gptq", 1.0),
        },
        noise_floor=divergence(2.4e-9),
        contamination=(
            Contamination(domain="prose", ngram=13, overlap=0.0004, contaminated=False),
            Contamination(domain="code", ngram=13, overlap=0.021, contaminated=True),
        ),
        gates=gates(),
        reproduce=Reproduce(
            command="compress recipe.lock.yaml",
            lock_file="recipe.lock.yaml",
            hashes={"recipe.lock.yaml": digest("lock"), "calibration": digest("calibration")},
        ),
    )


def gates() -> tuple[GateVerdict, ...]:
    return (
        GateVerdict(
            gate="max_worst_domain_bpb_increase",
            limit=0.08,
            estimate=estimate(0.052, 0.005),
            verdict="PASS",
            sentence="PASS: increase in bits per byte in the worst domain 0.052 [0.047, 0.0575], "
            "limit at most 0.08: the whole 95 % interval keeps the limit.",
        ),
        GateVerdict(
            gate="max_kl",
            limit=0.05,
            estimate=estimate(0.0472, 0.0038),
            verdict="INCONCLUSIVE",
            sentence="INCONCLUSIVE: mean KL from the base (nats/token) 0.0472 [0.0434, 0.05138], "
            "limit at most 0.05: the 95 % interval holds the limit; more evaluation text would "
            "decide.",
        ),
        GateVerdict(
            gate="max_bytes",
            limit=120_000_000,
            estimate=Estimate(value=111_722_332, low=111_722_332, high=111_722_332),
            verdict="PASS",
            sentence="PASS: bytes on disk 111,722,332; the limit is at most 120,000,000.",
        ),
    )


def report() -> Report:
    return build_report(facts())


def draft(measured: float) -> Draft:
    """A draft for the last variant, of a given measured speed-up at batch 1."""
    acceptance = Acceptance(by_position=(0.5, 0.2, 0.05), length=1.75, blocks=120)
    speed = DraftSpeed(
        batch=1,
        plain_tokens_per_second=31.5,
        draft_cost=0.24,
        verify_costs=(1.05, 1.1, 1.2),
        drafted=2,
        predicted=1.07,
        measured=measured,
        untrained=0.8,
        lookup=1.1,
        assisted=0.95,
        domains={name: DomainSpeed(predicted=1.07, measured=measured) for name in DOMAINS},
    )
    return Draft(
        id="4-draft.standalone",
        label="Draft, 1 block",
        target=variants()[-1].id,
        stage=StageFacts(
            method="draft.standalone", params={"drafted": 3}, seconds=100.0, peak_bytes=10**9
        ),
        path="deliverable/draft",
        bytes_on_disk=61_000_000,
        target_sha256=digest("target"),
        trained_tokens=300_000,
        measurement=DraftMeasurement(
            domains={name: DraftDomain(greedy=acceptance, sampled=acceptance) for name in DOMAINS},
            greedy=acceptance,
            sampled=acceptance,
            untrained=acceptance,
            lookup=acceptance,
            tree_length=None,
            speeds=(speed, speed.model_copy(update={"batch": 4, "assisted": None})),
            prompts=8,
            identical=7,
            largest_margin=0.0002,
        ),
        worthwhile=measured >= 1.05,
        outlook=None
        if measured >= 1.05
        else Outlook(
            limit="acceptance",
            better_cost=1.41,
            better_verify=1.12,
            better_acceptance=1.86,
            paying_parameters=310_000_000,
        ),
        curve=LearningCurve(
            points=tuple(
                CurvePoint(tokens=37_500 * 2**place, length=length)
                for place, length in enumerate((1.31, 1.46, 1.57, 1.75))
            ),
            fit=LogFit(intercept=-0.9, slope=0.209, low=0.14, high=0.28),
        ),
    )
