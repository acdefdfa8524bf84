"""The layer of the trainer that counts, of a mixture of experts, the tokens that sampler and trainer send to other experts.

It is what makes stock mixtures drift: another expert is another function. An exact run has none.

Methods of TRL's trainer that are overridden:

    _generate                                keeps the experts that the engine has sent each token to
    _generate_and_score_completions          puts them beside the log-probs
    _get_per_token_logps_and_entropies       keeps those of the trainer's own forward, where it is stock
    _compute_loss                            keeps them with the batch, and tells `pack` of its sizes

and of `MicroBatchedTrainer`:

    _in_parts                                keeps those of all parts of a rollout that is scored

B: rows of a batch, C: columns of completions, S: sampled tokens of them, L: layers with experts.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinvariant.models import lora
from rlinvariant.models.graphs import runs_as_graphs
from rlinvariant.models.limits import mixture_of
from rlinvariant.models.routing import Routing, slots_of
from rlinvariant.models.shards import unwrapped
from rlinvariant.text import say
from rlinvariant.trainer.division import Rows, sizes
from rlinvariant.trainer.drawing import DrawingTrainer
from rlinvariant.trainer.interface import SamplerLike
from rlinvariant.trainer.memory import decoder_of
from rlinvariant.trainer.packing import Sizes, pack


class RoutedTrainer(DrawingTrainer):
    """Compares the experts of a mixture on both sides, where the sampler says which it has chosen."""

    _routing: Routing | None = None
    _sampler_experts: list[np.ndarray] | None = None  # of each sample of the last rollout, [S, L]
    _trainer_experts: Tensor | None = None  # [B, C, L] of the policy's last forward, zero where nothing was scored
    _part_experts: Tensor | None = None  # the same of a part of it
    _sizes: Sizes | None = None  # of the batch whose loss is being computed, if they are known

    def _attach(self, sampler: SamplerLike) -> None:
        super()._attach(sampler)
        if mixture_of(self.model.config.get_text_config()) is None:
            return
        own: Any = sampler
        if (slots := slots_of(self.model.config)) is None:
            why = "the model's router chooses by more than its logits"
        elif not hasattr(own, "routes"):
            why = "the sampler does not say which experts it chose, nor do servers; it takes an engine of the trainer's own"
        elif own.routes is None:
            why = "the routers of a compiled sampler cannot be watched; sampler.enforce_eager=true compiles nothing"
        else:
            self._routing = Routing(self.model, slots)
            return
        if self.accelerator.is_main_process:
            say(f"note: onpolicy/router_flips is not counted: {why}")

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        output = super()._generate(prompts)
        if self._routing is not None:
            masks = self._sampled or [[1] * len(row) for row in output[1]]
            pairs = zip(output[1], masks, strict=True)
            self._sampler_experts = self._turns.experts([[t for t, m in zip(*pair, strict=True) if m] for pair in pairs])
        return output

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._routing is not None and self._sampler_experts is not None and self.model.training:
            lengths = output["completion_ids"].shape
            experts_BCL = torch.zeros(*lengths, self._routing.layers, dtype=torch.int64)
            for row, experts_SL in enumerate(self._sampler_experts):
                sampled = range(len(experts_SL)) if self._sampled is None else np.flatnonzero(self._sampled[row])
                experts_BCL[row, list(sampled)] = torch.from_numpy(experts_SL)
            output["experts"] = experts_BCL.to(output["completion_ids"].device)
        return output

    def _watch(self, model: Any) -> Routing | None:
        """Watch the routers from here on, if it is the policy that is about to run, and not a reference; return what does."""
        if self._routing is None or lora.is_reference(self.model):
            return None
        if unwrapped(model) is not unwrapped(self.model):
            return None
        self._routing.begin()
        return self._routing

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        routing = self._watch(model)
        result = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if routing is not None and (seen := routing.take()) is not None:
            self._trainer_experts = seen.view(*input_ids.shape, -1)[:, -logits_to_keep - 1 : -1]
        return result

    def _compute_loss(self, model, inputs):
        self._sizes = sizes(inputs, "sampled_tokens")
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._sizes = None
        if self._trainer_experts is not None:  # which are compared when other parts have run
            inputs["trainer_experts"] = self._trainer_experts
        return loss

    def _in_parts(self, lengths_B: Tensor, compute: Callable[[Rows], tuple[Tensor, ...]]) -> list[Tensor]:
        def with_experts(rows: Rows) -> tuple[Tensor, ...]:
            self._part_experts = None
            found = compute(rows)
            return found if self._part_experts is None else (*found, self._part_experts)

        found = super()._in_parts(lengths_B, with_experts)
        if self._part_experts is not None:
            self._trainer_experts = found.pop()
        return found

    def _packed_logprobs(self, model, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies [B, C], fp32, of the `wanted` [B, C] of the last columns of a padded batch [B, L]."""
        by_graphs = runs_as_graphs(decoder_of(unwrapped(model)))
        batch = pack(input_ids, attention_mask, wanted.shape[1], wanted=wanted, few_shapes=by_graphs, sizes=self._sizes)
        routing = self._watch(model)
        logprobs, entropies = model(
            **batch.inputs,
            attention_mask=None,
            token_ids=batch.token_ids,
            predicted_from=batch.predicted_from,
            temperature=self.temperature,
            **asdict(self.truncation),
        )
        if routing is not None and (seen := routing.take()) is not None:
            self._part_experts = torch.stack([batch.unpack(x) for x in seen[batch.predicted_from].T], -1)
        return batch.unpack(logprobs), batch.unpack(entropies)

    def _count_flips(self, inputs: dict[str, Any], mask: Tensor) -> None:
        """Add to the step's record how many of the sampled tokens went to other experts, in each layer and in any."""
        theirs, ours = inputs.get("experts"), inputs.get("trainer_experts", self._trainer_experts)
        if theirs is None or ours is None or ours.shape != theirs.shape:
            return
        other_SL = (ours != theirs)[mask]
        self._record.router_flips.append([*other_SL.sum(0).tolist(), int(other_SL.any(-1).sum())])
