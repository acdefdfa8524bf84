"""Exact on-policy reinforcement learning in one file: draw, pack, score, compare, loss, step, sync; and once more.

    python examples/one_step.py

vLLM draws completions and reports a log-prob for each token. A Hugging Face model scores the same tokens. Both run one model
definition over `rlinvariant.ops`, so the two log-probs of a token are the same 32 bits, and GRPO's ratio is exactly 1.

Each step also shows a control, which must fail: between the optimizer's step and the sync the sampler's weights are stale, and
the same comparison must count tokens that differ. The model is tiny and untrained: half a minute on two CPU cores.

The file reads from top to bottom. `rlinvariant.grpo_trainer` is the same loop inside TRL, with everything that a run needs.
docs/concepts/one-step.md follows one token through it.

N: tokens drawn in a step, G: groups (prompts), S: samples of a prompt.
"""

import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.models import make_invariant, require_exact
from rlinvariant.recipes.arithmetic import build_model
from rlinvariant.rollout import Completion, request_seed
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer.packing import Packed, pack
from rlinvariant.trainer.score import Layout, padded

STEPS, GROUPS, SAMPLES = 2, 4, 8
TEMPERATURE, MOST_TOKENS = 0.7, 24
RUN_SEED = 0


def draw(sampler: Sampler, prompts: Sequence[Sequence[int]], step: int) -> list[Completion]:
    """Draw one completion for each prompt. A request's seed depends on its place in the run, and so do its tokens."""
    seeds = [request_seed(RUN_SEED, step, i // SAMPLES, i % SAMPLES) for i in range(len(prompts))]
    return sampler.generate(prompts, seeds, temperature=TEMPERATURE, max_tokens=MOST_TOKENS)


def packed_row(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Packed:
    """Lay all sequences end to end in one row, each with its own positions: padding would need a mask, and rotate tokens."""
    ids, mask, width = padded(prompts, [c.token_ids for c in completions], Layout(micro_batch=len(prompts)))
    return pack(ids, mask, width)


def score(model: Any, row: Packed) -> Tensor:
    """Return the model's log-probs [N] fp32 of the drawn tokens, with gradient; the [N, vocabulary] matrix is never held."""
    scored = {"token_ids": row.token_ids, "predicted_from": row.predicted_from, "temperature": TEMPERATURE}
    logprobs_N, _entropies_N = model(**row.inputs, attention_mask=None, **scored)
    return logprobs_N


def compare(what: str, sampler_logprobs_N: Tensor, trainer_logprobs_N: Tensor) -> int:
    """Count the tokens whose two log-probs are not the same bits, and print the first."""
    difference = bits.compare(sampler_logprobs_N, trainer_logprobs_N.detach())
    count = difference.count if difference else 0
    print(f"{what}: mismatched {count} / {len(sampler_logprobs_N)}" + (f"; {difference}" if difference else ""), flush=True)
    return count


def rewards(completions: Sequence[Completion]) -> Tensor:
    """Return a reward [G, S] in which even an untrained model's completions differ: the variety of their tokens."""
    return torch.tensor([len(set(c.token_ids)) / MOST_TOKENS for c in completions]).view(GROUPS, SAMPLES)


def grpo_loss(trainer_logprobs_N: Tensor, sampler_logprobs_N: Tensor, rewards_GS: Tensor, lengths: Tensor) -> Tensor:
    """GRPO on policy: no clipping and no importance weights, since the ratio is 1; its gradient is the policy gradient."""
    advantages_GS = (rewards_GS - rewards_GS.mean(1, keepdim=True)) / (rewards_GS.std(1, keepdim=True) + 1e-4)
    advantages_N = advantages_GS.flatten().repeat_interleave(lengths)
    ratio_N = (trainer_logprobs_N - sampler_logprobs_N).exp()
    assert (ratio_N == 1).all(), "the policy that sampled is not the policy that is trained"
    return -(advantages_N * ratio_N).mean()


def main() -> None:
    torch.manual_seed(RUN_SEED)
    model, tokenizer = build_model()  # fp32 parameters, which the optimizer updates
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        sampler = Sampler(directory, invariant=True, max_model_len=64, kv_cache_gib=0.1)
    require_exact(make_invariant(model, torch.bfloat16))  # the audit: nothing in it sums outside the ops
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = random.Random(RUN_SEED)

    for step in range(STEPS):
        texts = [f"{rng.randrange(1000)}+{rng.randrange(1000)}=" for _ in range(GROUPS)]
        prompts = [ids for ids in tokenizer(texts).input_ids for _ in range(SAMPLES)]

        completions = draw(sampler, prompts, step)
        sampler_logprobs_N = torch.tensor([x for c in completions for x in c.sampler_logprobs])
        row = packed_row(prompts, completions)
        trainer_logprobs_N = score(model, row)
        compare(f"step {step}", sampler_logprobs_N, trainer_logprobs_N)

        rewards_GS, lengths = rewards(completions), torch.tensor([len(c.token_ids) for c in completions])
        loss = grpo_loss(trainer_logprobs_N, sampler_logprobs_N, rewards_GS, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        compare(f"step {step}, control: the sampler's weights are stale", sampler_logprobs_N, score(model, row))
        sampler.sync(model.named_parameters())
        assert not sampler.differing_weights(model.named_parameters())

    completions = draw(sampler, prompts, STEPS)  # after the last step, with the weights that it left
    sampler_logprobs_N = torch.tensor([x for c in completions for x in c.sampler_logprobs])
    compare(f"after {STEPS} steps", sampler_logprobs_N, score(model, packed_row(prompts, completions)))


if __name__ == "__main__":
    main()
