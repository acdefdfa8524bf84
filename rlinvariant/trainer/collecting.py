"""The layer of the trainer that keeps what was said: a row for each completion of a step, `samples.Samples`.

Two of TRL's methods are overridden, in training alone:

    _calculate_rewards                adds texts and rewards
    _generate_and_score_completions   adds advantages

N: completions of all ranks, F: reward functions.
"""

from typing import Any

from rlinvariant.trainer.finite import FiniteTrainer
from rlinvariant.trainer.interface import OnSamples
from rlinvariant.trainer.record import StepRecord


class CollectingTrainer(FiniteTrainer):
    """Collects the completions of a step in its record, and hands them on."""

    _record: StepRecord
    _on_samples: OnSamples | None
    _tokenizer: Any
    eos_token_ids: list[int]

    @property
    def end_ids(self) -> list[int]:
        """Return the tokens that end a completion; one without any at its end was cut."""
        return [*self.eos_token_ids, self._tokenizer.pad_token_id]

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        rewards_NF = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        if self.model.training:
            self._record.samples.score(self, prompts, completions, rewards_NF)
        return rewards_NF

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._record.samples.weigh(output)
        return output

    def _hand_on_samples(self, record: StepRecord) -> None:
        """Give `on_samples` what was drawn, on the main process; its seconds are part of the step."""
        if self._on_samples is not None and record.samples.rows and self.accelerator.is_main_process:
            with record.timed("save"):
                self._on_samples(record.samples.rows)
