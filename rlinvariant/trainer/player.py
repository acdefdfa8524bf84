"""Completions drawn, over all their turns, and graded as in training, for the evaluation of weights that nobody trains.

N: completions, F: reward functions.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant.errors import ConfigErrors
from rlinvariant.rewards import RewardLimits
from rlinvariant.rollout import Truncation, is_cut, request_seed
from rlinvariant.trainer.drawing import DrawingTrainer
from rlinvariant.trainer.episodes import Episodes
from rlinvariant.trainer.grading import call_rewards, checked_rewards, settle_rewards, weighted_sums
from rlinvariant.trainer.interface import SamplerLike
from rlinvariant.trainer.preflight import Tooling, constructing
from rlinvariant.trainer.samples import or_none, spans
from rlinvariant.types import JsonObject, JsonRow

if TYPE_CHECKING:
    from rlinvariant.types import RewardCall

KEPT = ("use_cpu", "seed", "max_completion_length", "max_tool_calling_iterations", "chat_template_kwargs", "reward_weights")
"""The fields of TRL's configuration that an evaluation depends on; temperature and truncation come with each call."""


@dataclass(frozen=True)
class Played:
    """Holds N completions and their rewards.

    Args:
        ids: token ids of each, what tools answered among them.
        sampled: for each of these 1 if it was sampled, 0 if a tool wrote it; None: there are no tools.
        rewards_NF: [N, F] fp32, of all ranks; NaN where a function does not apply.
    """

    ids: list[list[int]]
    sampled: list[list[int]] | None
    rewards_NF: Tensor


def play(trainer: DrawingTrainer, rows: Sequence[JsonRow], group: int = 1) -> Played:
    """Draw a completion for each row, by TRL's own loop over turns, and grade it. All ranks call this.

    Args:
        trainer: in evaluation.
        rows: of this rank; `group` in a row are the same one, and play the same episode.

    Raises:
        UserError: a tool, an environment or a reward function failed in a way that ends the run.
    """
    episodes = trainer._episodes
    prompts: list[Any] = [row["prompt"] for row in rows] if episodes is None else episodes.open(rows, group)
    _, ids, sampled, completions, *_ = trainer._generate(prompts)
    return Played(ids, sampled, call_rewards(trainer, rows, prompts, completions, ids))


class Player(DrawingTrainer):
    """Draws and grades as a trainer does, by an engine that keeps its weights.

    In the place of the model that TRL's trainer trains stands one of a few numbers, which nothing runs.

    Args:
        args: TRL's configuration, of which the fields in `KEPT` hold.
        tokenizer: of the model; it has the chat template.
        generation: the model's generation settings, which name the tokens that end a completion.
        rewards: reward functions, plain or async.
        limits: how they are called.
        tooling: tools and environments.
        rows: what is evaluated.
        sampler: called once, when nothing is wrong with all this; returns the engine.

    Raises:
        ConfigErrors: a reward is a model, which only a trainer loads.
    """

    def __init__(
        self,
        args: GRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
        rewards: "Sequence[RewardCall]",
        limits: RewardLimits,
        tooling: Tooling,
        rows: Dataset,
        sampler: Callable[[], SamplerLike],
    ) -> None:
        if models := [reward for reward in rewards if isinstance(reward, str) or hasattr(reward, "forward")]:
            raise ConfigErrors([f"reward {models[0]}: a reward model; eval takes reward functions: call the model in one"])
        self.invariance, self._sampler_is_invariant, self._on_rollout = "exact", True, None
        self._episodes = Episodes(self, tooling, tokenizer) if tooling else None
        more = {} if self._episodes is None else self._episodes.arguments()
        given = checked_rewards(self, list(rewards), limits)
        with tempfile.TemporaryDirectory() as directory, constructing():  # transformers makes the directory, which stays empty
            own = GRPOConfig(directory, bf16=False, report_to="none", **{name: getattr(args, name) for name in KEPT})
            super().__init__(_stand_in(generation), [*given], own, rows, processing_class=tokenizer, **more)
        settle_rewards(self, len(given), limits)
        self._attach(sampler())
        self.model.eval()

    def play(self, rows: Sequence[JsonRow], temperature: float, group: int, truncation: Truncation) -> list[JsonObject]:
        """Draw and grade a completion for each row; completion j of problem i has the seed of (run, 0, i, j).

        Args:
            rows: `group` in a row are the same problem.
            temperature: 0 draws the likeliest tokens.
            truncation: which tokens are drawn from.

        Returns:
            For each its `seed` (None if greedy), `length` in sampled tokens, whether it was `cut`, its text as `completion`,
            `reward`, and `rewards` by name, None where none applies; where there are tools, also `tool_results`.
        """
        self.temperature, self.num_generations_eval, self.truncation = temperature, group, truncation
        played, seeds = play(self, rows, group), self._seeds(len(rows), group)
        totals = weighted_sums(played.rewards_NF.cpu(), self.reward_weights)
        found: list[JsonObject] = []
        for i, (ids, each) in enumerate(zip(played.ids, played.rewards_NF.tolist(), strict=True)):
            mask = None if played.sampled is None else played.sampled[i]
            seen: JsonObject = {"seed": seeds[i] if temperature else None, "length": len(ids) if mask is None else sum(mask)}
            seen |= {"cut": is_cut(ids, self.end_ids)}
            seen |= {"completion": self._tokenizer.decode(ids, skip_special_tokens=mask is None)}
            seen |= {} if mask is None else {"tool_results": spans(self._tokenizer, ids, mask)}
            names = zip(self.reward_func_names, each, strict=True)
            seen |= {"reward": or_none(totals[i]), "rewards": [{"name": n, "reward": or_none(r)} for n, r in names]}
            found.append(seen)
        return found

    def sync(self, stale: bool = False) -> None:
        """Leave the engine the weights that it has loaded."""

    def _seeds(self, count: int, group: int) -> list[int]:
        return [request_seed(self.args.seed, 0, i // group, i % group) for i in range(count)]


def _stand_in(generation: GenerationConfig) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config = generation
    return model
