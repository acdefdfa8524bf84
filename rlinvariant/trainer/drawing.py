"""The layer of the trainer that draws: gives the sampler the weights, and requests their seeds, turn after turn.

Methods of TRL's trainer that are overridden:

    train                   forgets which weights sampler and disk held
    _generate               syncs the weights, once; keeps what all turns have given, and hands it on
    _tool_call_loop         keeps the conversations, whose last messages say which samples a turn goes on with
    _generate_single_turn   draws one turn of TRL's

A sample is one of the prompts that `_generate` is given, and what follows it: what the model said, what a tool answered, what
the model said to that. A rank draws as many turns as its own samples take: within a turn no rank waits for another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, zip_longest
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlinvariant import bits, checksums
from rlinvariant.checksums import Checksum
from rlinvariant.conflicts import Invariance
from rlinvariant.errors import ParityError, ServersLost
from rlinvariant.models import lora, shards
from rlinvariant.models.shards import unwrapped
from rlinvariant.rollout import Batch, Completion, Rollout, Truncation, request_seed
from rlinvariant.trainer import custom_rollouts
from rlinvariant.trainer.episodes import EpisodesTrainer
from rlinvariant.trainer.interface import OnRollout, SamplerLike
from rlinvariant.trainer.turns import AttachedSampler, Turns, rollouts_before


class DrawingTrainer(EpisodesTrainer):
    """Draws rollouts, of one turn or of many, as the module says."""

    sampler: SamplerLike
    invariance: Invariance
    temperature: float
    truncation: Truncation
    max_completion_length: int
    rollout_func: Any
    vllm_generation: Any
    _last_loaded_step: int
    _on_rollout: OnRollout | None
    _sampler_is_invariant: bool
    _seeded: dict[bool, tuple[int, int]]  # training or not -> (last step, rollouts that it had had before)
    _drawn: list[Batch]  # by this step on all ranks, of what was handed to `on_rollout`
    _shared: set[str]  # names of frozen weights that lie in the sampler's memory
    _pairs: Sequence[tuple[str, Tensor]] = ()  # of `lora.pairs`, during a sync
    _frozen: dict[str, Checksum]  # of these, as the first sync found them, or when they were last edited on purpose
    _turns: Turns  # of the rollout that is being drawn, or was drawn last
    _sampler_logprobs: list[list[float]]  # of the last rollout, one for each token; a tool's have any number
    _sampled: list[list[int]] | None  # of the last rollout, 1 for each token that was sampled, 0 for a tool's; None: all were
    _tool_mask: Tensor | None = None  # the same as [B, C] of the batch that is scored, padded

    def _attach(self, sampler: SamplerLike) -> None:
        """Let TRL find the engine where it looks for its own."""
        self.sampler, self._seeded, self._drawn, self._shared = sampler, {}, [], set()
        if self.invariance == "exact" and not self.sharded and lora.ranks(self.model):
            self._shared = lora.share_base(self.model, sampler.memory_of(lora.base(self.model)))
        self.use_vllm = True  # TRL's name for "the rollout carries log-probs": turns on its correction, if asked for
        self.vllm_mode, self.vllm_generation = "colocate", AttachedSampler(self)
        if self.rollout_func is not None:
            config = self.model.config.get_text_config()
            positions = getattr(config, "max_position_embeddings", None)
            self.rollout_func = custom_rollouts.checked(self.rollout_func, config.vocab_size, positions)

    def train(self, *args, **kwargs):
        """Train as `MeasuredTrainer` does; the first rollout syncs the weights, whatever the sampler held."""
        self._versions.forget()
        self._seeded = {}
        return super().train(*args, **kwargs)

    # ---- a rollout

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Draw all turns of a rollout; TRL has repeated each prompt `num_generations` times over all ranks."""
        try:
            return self._rollout(prompts)
        except ServersLost as lost:
            self._save_unsaved(lost.agreed or self.accelerator.num_processes == 1)
            raise

    def _save_unsaved(self, together: bool) -> None:
        """Save the steps that are done, if none of their work is on the disk, before the run ends for want of servers.

        Args:
            together: whether all ranks are here; one that is alone cannot save.
        """
        step, between = self.state.global_step, self._step % self.args.gradient_accumulation_steps == 0
        if self.model.training and together and between and step not in (0, self._versions.disk):
            self._save_checkpoint(self.model, None)
            self._wait_for_disk()

    def _rollout(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Give the sampler the weights, and draw by TRL's own loop."""
        training = bool(self.model.training)
        group = self.num_generations if training else self.num_generations_eval
        self.sync(stale=training)
        self._last_loaded_step = self.state.global_step  # TRL need not sync
        self._turns = Turns(self._seeds(len(prompts), group))
        output: Any = super()._generate(prompts)
        prompt_ids, completion_ids, self._sampled, _, self._sampler_logprobs, *_ = output
        rows = [torch.tensor(row) for row in self._sampled or []]
        self._tool_mask = pad_sequence(rows, batch_first=True).to(self.accelerator.device) if rows else None
        if training:
            self._versions.sampled(self.state.global_step)
            self._record.samples.draw(self, prompt_ids, completion_ids, self._sampler_logprobs, self._sampled, group)
            self._hand_on(self._turns.batches)
        return output

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, *args, **kwargs):
        self._turns.conversations = completions
        return super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *args, **kwargs)

    def _end_turns(self) -> None:
        self.sampler.finish()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        """Return token ids and log-probs of a turn; TRL adds to the lists."""
        drawn = self.draw(prompt_ids, self._turns.continued(prompt_ids))
        return [list(c.token_ids) for c in drawn], [list(c.sampler_logprobs) for c in drawn]

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int] | None = None,
        max_tokens: int | None = None,
    ) -> list[Completion]:
        """Draw the next turn of some samples; what a `rollout_func` calls. No rank waits for another here.

        A sample's first turn has the seed that it has in a run of one turn, and a later one a seed made of that and of the
        turn's number: they depend on the run's seed, the step, the sample and how often it was drawn, and on nothing else.

        Args:
            prompts: token ids of all that the turn is to follow: the first prompt, and whatever came after it.
            samples: which of the prompts that `rollout_func` was given each is a turn of, by number; None: all, in order.
            max_tokens: most tokens of each completion; never more than `max_completion_length` leaves behind the sample's first
                prompt, and the engine's max_model_len. None: as many as these leave.

        Returns:
            A `Completion` for each prompt: its tokens, and for each the sampler's log-prob; no tokens where no room is left.

        Raises:
            UserError: a prompt is empty, a first one does not fit with its completion, or there is no such sample.
        """
        samples = list(range(len(prompts))) if samples is None else samples
        self._turns.require(prompts, samples)
        limits = self._turns.limits(prompts, samples, self.max_completion_length, self.sampler.max_model_len)
        limits = [limit if max_tokens is None else min(limit, max_tokens) for limit in limits]
        seeds = self._turns.seeds(samples)
        asked = [i for i, limit in enumerate(limits) if limit > 0]
        later = self._turns.later(samples)
        drawn = [Completion([], []) for _ in prompts]
        if asked:
            batch = self._ask([prompts[i] for i in asked], [seeds[i] for i in asked], [limits[i] for i in asked])
            self._turns.batches.append(batch)
            for i, completion in zip(asked, batch.completions, strict=True):
                drawn[i] = completion
                if self.model.training:
                    self._record.count_prompt(len(prompts[i]), completion.cached_tokens, later[i])
        self._turns.add(prompts, samples, drawn)
        return drawn

    def _ask(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int]) -> Batch:
        """Draw requests, and return them with what came back."""
        how: dict[str, Any] = {"temperature": self.temperature, "stop_token_ids": list(self.eos_token_ids)}
        how |= asdict(self.truncation)
        with self._timed("rollout"):
            return Batch(prompts, seeds, self.sampler.generate(prompts, seeds, max_tokens=limits, **how), limits)

    def _hand_on(self, batches: list[Batch]) -> None:
        """Give `on_rollout` what this step has drawn so far, if the weights that it was drawn with can be loaded again."""
        step = self.state.global_step
        if self._on_rollout is None or not self._versions.on_disk(step):
            return
        if hasattr(self.model, "peft_config") and not self._sampler_is_invariant:  # `replay` loads no merged weights
            return
        with self._timed("save"):
            ranks, weights = gather_object([batches]), self._digest()
            if not self.accelerator.is_main_process:
                return
            self._drawn += [b for b in chain.from_iterable(zip_longest(*ranks)) if b is not None]  # turn after turn
            if not self._drawn:  # a `rollout_func` has drawn by something else
                return
            how = self.temperature, self.max_completion_length, list(self.eos_token_ids), weights, self.truncation
            self._on_rollout(step + 1, Rollout(self._drawn, *how))

    def _digest(self) -> str:
        """Return what tells the weights apart from others, on the main rank: a hash of them, or of the checksums of shards."""
        if self.sharded:
            return checksums.digest(shards.checksums(self._held()).items())
        return bits.digest(self._weights()) if self.accelerator.is_main_process else ""

    def _seeds(self, count: int, group: int) -> list[int]:
        """Derive a seed for each sample's first turn from (run seed, step, prompt, sample): distinct over a group and ranks.

        A step that samples more than once, and evaluation, draw from runs of their own.
        """
        step, training = self.state.global_step, bool(self.model.training)
        earlier = rollouts_before(self._seeded, training, step)
        self._seeded[training] = (step, earlier)
        run = request_seed(self.args.seed, earlier, int(training), 0)
        first = self.accelerator.process_index * count
        return [request_seed(run, step, i // group, i % group) for i in range(first, first + count)]

    # ---- the weights that draw

    def sync(self, stale: bool = False) -> None:
        """Give the sampler the current weights, unless it has them, bit for bit. All ranks call this.

        Args:
            stale: give it the weights of `staleness` steps ago instead.

        Raises:
            ParityError: with invariance="exact", when a parameter of the sampler differs after the sync.
            UserError: a weight is not finite.
        """
        step = self.state.global_step
        when = () if self.model.training else (f"after step {step}", "stopped before they were sampled from")
        version, older = self._versions.to_sample_with(step, stale)
        with self._timed("sync"), self._pairs_once():
            self._require_finite(((f"weight {name}", w) for name, w in self._held()), *when)
            first = self._versions.sampler is None
            self._frozen = {} if first else self._frozen
            whole = first and not self._has_base(older)
            if self._versions.sampler == version and self._sampler_is_invariant:  # all of a stock one's cannot be read
                if not self._differing(older):
                    return
                self._versions.edited()
                self._frozen, whole = self._checksums_of_shared(), True
            self.sampler.sync(self._weights(older) if whole else self._moving(older))
            differing = self._differing(older)
        self._versions.sampler, self._record.weights_equal = version, not differing
        if not self._sampler_is_invariant and hasattr(self.model, "peft_config"):
            self._record.merged_share = lora.share_merged(unwrapped(self.model))
        if differing and self.invariance == "exact":
            differ = f"{len(differing)} of the sampler's parameters differ from the trainer's, first {differing[0]}"
            raise ParityError(f"step {step + 1}: after the weight sync, {differ}", agreed=True)

    def _has_base(self, older: dict[str, Tensor] | None) -> bool:
        """Return whether adapters are trained, and the sampler has their base: it is not sent then. All ranks call this."""
        adapted = self._sampler_is_invariant and lora.ranks(unwrapped(self.model))
        return bool(adapted) and all(lora.A in name or lora.B in name for name in self._differing(older))

    def _differing(self, older: dict[str, Tensor] | None) -> list[str]:
        """Name the sampler's parameters that differ from the weights, on the first rank where some do; the same on all ranks.

        Weights in shards are compared by checksums, which need no gather. Whole ones are compared with the first rank's, too:
        a rank whose own have changed has given its sampler the same.
        """
        now: dict[str, Checksum] = {}
        if self.sharded:
            found = self.sampler.differing_checksums(shards.checksums(self._held(older), self.sampler.dtype))
        else:
            found = self.sampler.differing_weights(self._weights(older))
            now = self._checksums_of_shared()
            self._frozen = self._frozen or now
            found += [f"{name} (frozen, but edited; both have the edit)" for name in now if now[name] != self._frozen[name]]
        if self.accelerator.num_processes > 1:
            held = () if self.sharded else self._held(older)
            own = now | checksums.wholes((name, weight) for name, weight in held if name not in now)
            ranks = gather_object([(found, own)])
            first = ranks[0][1]
            for rank, (names, sums) in enumerate(ranks):
                moved = [f"{name} (rank {rank}, whose own is not rank 0's)" for name, x in sums.items() if x != first[name]]
                if found := [f"{name} (rank {rank})" for name in names] + moved:
                    break
        return found

    def _checksums_of_shared(self) -> dict[str, Checksum]:
        """Return the checksum of each weight that both sides have in one place, where a comparison of the two sees no edit."""
        own = self._pairs or lora.base(unwrapped(self.model)) if self._shared else ()
        return checksums.wholes((name, weight) for name, weight in own if name in self._shared)

    @contextmanager
    def _pairs_once(self) -> Iterator[None]:
        """Go through the model, and scale the adapters, once for all that a sync does with its weights."""
        self._pairs = [*lora.pairs(unwrapped(self.model))] if self._sampler_is_invariant else []
        try:
            yield
        finally:
            self._pairs = []

    def _held(self, older: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors of the policy's parameters, or of older ones, as this rank has them: whole, or in shards."""
        model = unwrapped(self.model)
        now = self._pairs or (lora.pairs(model) if self._sampler_is_invariant else lora.merged(model))
        if older is None:
            return iter(now)
        return ((name, shards.like(older[name].to(self.accelerator.device), w)) for name, w in now)

    def _weights(self, older: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield names and whole tensors of what `_held` yields, on the device: all ranks gather shards, one after the other.

        Shards are rounded to the sampler's dtype before, as it would do after: half as much is sent.
        """
        if not self.sharded:
            return self._held(older)
        return ((name, shards.whole(w.detach().to(self.sampler.dtype))) for name, w in self._held(older))

    def _moving(self, older: dict[str, Tensor] | None):
        """Yield those of `_weights` that training moves: of a model in PEFT, its adapters alone."""
        whole = older is not None or not self._sampler_is_invariant
        _, adapters = ([], []) if whole else lora.split(self._held())
        return ((name, shards.whole(w)) for name, w in adapters) if adapters else self._weights(older)

    # ---- over a resume

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"seeded": self._seeded, "versions": self._versions.state()}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        self._versions.restore(progress["versions"], disk=self.state.global_step)
        self._seeded = progress["seeded"]
