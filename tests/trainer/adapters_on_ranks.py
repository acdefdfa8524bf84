"""A trainer of adapters with weights in shards, whose sides are changed behind its back; DIRECTORY/RANK.json has what it says.

accelerate launch --config_file configs/cpu2_fsdp2.yaml adapters_on_ranks.py DIRECTORY MODEL each|shared    samplers
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def flip(x: Tensor) -> None:
    """Flip the lowest bit of the first number."""
    word = {2: torch.int16, 4: torch.int32}[x.element_size()]
    x.view(-1)[:1].view(word).bitwise_xor_(1)


def main(directory: str, model: str, shared: str) -> int:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    import rlinvariant
    from rlinvariant.errors import ParityError
    from rlinvariant.models import lora, shards
    from rlinvariant.sampler import adapters
    from rlinvariant.verification.controls import stale_weights
    from rlinvariant.verification.relations import sampler_and_trainer
    from rlinvariant.verification.start import pair_of
    from tests.parity.harness import questions, small_config, variety

    rank = os.environ["RANK"]
    spread = {"tensor_parallel_size": 2} if shared == "shared" else {}
    trainer: Any = rlinvariant.grpo_trainer(
        model,
        variety,
        small_config(directory, max_steps=1),
        questions(),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=3, target_modules="all-linear"),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True, **spread}},
    )
    trainer.train()
    trainer.sync()
    policy, sampler = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.sampler
    names = [name for name, _ in lora.adapters(policy)]
    pair = pair_of(policy, sampler, policy.config.vocab_size)
    seen: dict[str, Any] = {"adapters": names}
    seen["in sync"] = {"mismatched": sampler_and_trainer(pair).mismatched, "differing": trainer._differing(None)}

    with torch.no_grad():
        for _, weight in lora.trained(policy):
            shards.local(weight).add_(0.01)
    seen["one sync old"] = {"mismatched": stale_weights(pair).mismatched, "differing": trainer._differing(None)}

    sync = sampler.sync

    def faulty(weights: Any) -> None:
        sync(weights)
        if rank == "1":
            flip(adapters._slot(sampler.model, adapters.layers(sampler.model), names[0]).kept)

    sampler.sync, trainer.state.global_step = faulty, 2
    try:
        trainer.sync()
    except ParityError as error:
        seen["a bit of rank 1's engine"] = str(error)
    sampler.sync = sync
    trainer.sync()

    if rank == "1":
        flip(shards.local(dict(lora.base(policy))["model.layers.1.mlp.down_proj.weight"]))
    seen["a bit of the base"] = trainer._differing(None)
    Path(directory, f"{rank}.json").write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
