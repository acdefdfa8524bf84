"""A mixture of the 30B-A3B shape, a quarter of its layers: rollouts against stock vLLM, training against `grouped_mm`.

Rollouts are those of `bench sampler`, training is that of `bench trainer`: transformers' own mixture multiplies by
`torch.grouped_mm`, its default. Autocast does not reach that function, which would multiply experts in float32, many times as
slow: so the stock side's weights are in bfloat16, and ours in float32, as everywhere.
"""

from collections.abc import Iterator

from rlinvariant.bench import gpu_trainer, sampler
from rlinvariant.bench.measure import Missing, Row

TARGETS = {"equal": 0.8, "ragged": 0.8}  # of stock's tokens per second


def rows(tiny: bool) -> Iterator[Row | Missing]:
    setup, size = ("tiny-moe", "tiny") if tiny else ("moe", "2k")
    yield from sampler.measured(setup)
    yield from gpu_trainer.measured(sampler.SETUPS[setup].model, (size,), TARGETS, memory=None)
