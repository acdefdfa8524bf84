"""LoRA: the memory that training a large model with adapters takes, alone on the device, or on a part of it.

Every projection of the decoder has an adapter, as in `bench lora`. Whatever is more than the part is taken beforehand, so that
the trainer finds a smaller card and divides its steps for that: on the whole it would fill the whole.
"""

import tempfile
from collections.abc import Iterator

from rlinvariant.bench import gpu, gpu_step
from rlinvariant.bench.lora import RANK
from rlinvariant.bench.measure import Missing, Row, Worker, Workers, compared
from rlinvariant.models.shapes import build

MODELS = {"qwen3-8b": 60, "qwen3-32b-half": None}  # model -> GiB of the device that its training has; None: all


def rows(tiny: bool) -> Iterator[Row | Missing]:
    which, models = ("tiny", {"tiny": None}) if tiny or gpu.name() == "cpu" else ("large", MODELS)
    for model, gib in models.items():
        with tempfile.TemporaryDirectory() as directory:
            path = build(model, directory)
            with gpu.leaving(gib):
                yield _row(model, path, which, gib)


def _row(model: str, path: str, which: str, gib: int | None) -> Row | Missing:
    size, whole = gpu_step.SIZES[which], gpu.memory_gib() if gib is None else gib
    case = f"memory of {model}, two steps of {size.prompts} prompts x {gpu_step.GENERATIONS} with adapters, of {whole:.0f} GiB"
    with Workers({"adapters": Worker("rlinvariant.bench.gpu_step", "exact", path, which, str(RANK))}) as workers:
        answers = [workers.ask(["adapters"], length=n) for n in (size.short, size.length, size.length)]
    if not all(answers):
        return Missing("lora_large", case, "; ".join(workers.missing.values()), {})
    steps = [answer["adapters"] for answer in answers[1:]]
    reserved = max(step["reserved"] for step in steps)
    equal, target = {"ours": all(step["exact"] for step in steps)}, None if gib is None else 1.0
    return compared("lora_large", case, reserved, whole * 1024, "MiB", target, equal, len(steps))
