"""The layer of the trainer that runs tools and environments: each call guarded, each episode begun from a seed.

Methods of TRL's trainer that are overridden:

    _generate_and_score_completions   begins the episodes of a rollout
    _generate                         puts a guard around each tool of each sample
    _tool_call_loop                   ends all ranks alike, where a call has ended one
    _get_tool_suffix_ids              ends a sample whose tool has failed so
"""

import atexit
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl.trainer.utils import shutdown_event_loop_in_daemon

from rlinvariant.errors import UserError, located
from rlinvariant.launch import raise_on_all
from rlinvariant.rewards.watchdog import OverdueReward, watchdog
from rlinvariant.rollout import request_seed
from rlinvariant.tools import Calls, Ended, Place
from rlinvariant.trainer.measured import MeasuredTrainer
from rlinvariant.trainer.preflight.tools import Tooling, methods, with_seed
from rlinvariant.trainer.turns import rollouts_before
from rlinvariant.types import EnvironmentFactory, Json, JsonObject, JsonRow, Untyped

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

EPISODES = 2**30  # in place of a sample's number: apart from every seed of a sample


class Episodes:
    """Runs the tools and environments of a trainer.

    Args:
        trainer: TRL's, or what has its attributes.
        tooling: what it was given.
        tokenizer: the run's.
    """

    def __init__(self, trainer: Untyped, tooling: Tooling, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._trainer, self._tooling = trainer, tooling
        self._calls = Calls(tooling.limits, tokenizer.all_special_tokens)
        self._calls.cage(tooling.tools)
        self._next, self._seeds = 0, (0, 0, 1)
        self.conversations: Sequence[Sequence[Mapping[str, Any]]] = ()  # of each sample, what follows its prompt

    def arguments(self) -> JsonObject:
        """Return the arguments of TRL's trainer, whose environments are reset under guard."""
        made = {name: functools.partial(self._make, factory) for name, factory in self._tooling.factories.items()}
        factory = made if isinstance(self._tooling.environment, dict) else made.get(None)
        return {"tools": list(self._tooling.tools) or None, "environment_factory": factory}

    def _make(self, factory: EnvironmentFactory) -> Any:
        try:
            environment: Any = factory()
        except Exception as error:  # the user's own code
            raise UserError(f"environment: cannot be made: {located(error)}; mend it") from error
        reset = environment.reset
        if getattr(reset, "func", None) == self._reset:
            shared = "its factory has returned the same object twice, and two samples would play one episode"
            raise UserError(f"environment {type(environment).__name__}: {shared}; return a new one at each call")
        environment.reset = functools.partial(self._reset, environment, reset)
        return environment

    def begin(self, group: int) -> None:
        """Start the episodes of a rollout, of which `group` in a row have one seed.

        In training a seed depends on the run's seed, the step and the group alone, so that the samples of a group, which are
        compared with each other, meet the same episode, and a run that is resumed the same ones; in evaluation not on the step.
        """
        trainer = self._trainer
        training, step = bool(trainer.model.training), trainer.state.global_step
        earlier = rollouts_before(trainer._seeded, training, step)  # a step that samples again has other episodes then
        self._next = 0
        self._seeds = request_seed(trainer.args.seed, earlier, int(training), EPISODES), step if training else 0, group

    def _reset(self, environment: Any, reset: "Callable[..., Any]", /, **row: Any) -> str | None:
        """Reset the environment of the next sample."""
        index, self._next = self._next, self._next + 1
        run, step, group = self._seeds
        place = self.place(index)
        seed = request_seed(run, step, place.sample // group, EPISODES)
        with self._trainer._timed("tools"):
            return self._calls.reset(environment, reset, with_seed(reset, row, seed), place)

    def place(self, index: int) -> Place:
        """Return where a sample of this rank stands."""
        first = self._trainer.accelerator.process_index * self._count
        spoken = self.conversations[index] if index < len(self.conversations) else ()
        turn = sum(message["role"] == "assistant" for message in spoken)
        step = self._trainer.state.global_step + 1 if self._trainer.model.training else None
        return Place(step, first + index, max(1, turn))

    def count(self, samples: int) -> None:
        """Say how many samples this rank's rollout has."""
        self._count, self.conversations = samples, ()

    def open(self, rows: Sequence[JsonRow], group: int = 1) -> list[Json]:
        """Start an episode for each row, as TRL does in training, and return the prompts: with what the environments say.

        Of the rows, `group` in a row play the same episode.
        """
        trainer = self._trainer
        self.count(len(rows))
        self.begin(group)
        if trainer.environment_factories is None:
            return [row["prompt"] for row in rows]
        several = trainer._multi_environment
        trainer._batch_environments = [row.get("environment") if several else None for row in rows]
        trainer.environments, taken, prompts = [], dict[Any, int](), []
        for name, row in zip(trainer._batch_environments, rows, strict=True):
            pool, number = trainer._environment_pool[name], taken.get(name, 0)
            if number == len(pool):
                pool.append(trainer.environment_factories[name]())
            taken[name] = number + 1
            trainer.environments.append(pool[number])
            said = pool[number].reset(**{key: value for key, value in row.items() if not (several and key == "environment")})
            *before, last = row["prompt"]
            prompts.append([*before, {**last, "content": last["content"] + (said or "")}])
        return prompts

    def guard(self) -> None:
        """Put guarded tools where TRL's loop looks for them, sample by sample."""
        trainer = self._trainer
        boxes = []
        for index in range(self._count):
            own = methods(trainer.environments[index]) if trainer.environments else []
            boxes.append(self._calls.boxes(trainer._standalone_tools, own, functools.partial(self.place, index)))
        trainer._sync_tool_dicts, trainer._async_tool_dicts = [box for box, _ in boxes], [awaited for _, awaited in boxes]

    def end_alike(self, own: UserError | None = None) -> None:
        """Raise on every rank what a call has ended one with. All ranks call this, between two turns never.

        Raises:
            UserError: as it says.
        """
        own = own or self._calls.error
        self._calls.error = None
        raise_on_all(own)


class EpisodesTrainer(MeasuredTrainer):
    """Runs tools and environments, as the module says."""

    _episodes: Episodes | None  # None: neither tools nor environments
    max_completion_length: int

    def _generate_and_score_completions(self, inputs):
        if self._episodes is not None:
            self._episodes.count(len(inputs))
            self._episodes.begin(self.num_generations if self.model.training else self.num_generations_eval)
        return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self._episodes is not None:
            self._episodes.end_alike()  # a reset may have failed
            self._episodes.guard()
        return super()._generate(prompts)

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, *args, **kwargs):
        assert self._episodes is not None, "only tools have a loop"
        self._episodes.conversations = completions
        own = result = None
        try:
            with self._timed("tools"):  # without what `rollout` counts inside
                result = super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *args, **kwargs)
        except OverdueReward as overdue:  # a coroutine that holds TRL's event loop: no tool can be called on it again
            own = UserError(str(overdue))
            watchdog().abandon()
            atexit.unregister(shutdown_event_loop_in_daemon)  # it would wait for the loop
        self._end_turns()
        self._episodes.end_alike(own)
        return result

    def _end_turns(self) -> None:
        """Let those ranks draw on that have more turns; here, as the ranks wait for each other next."""
        raise NotImplementedError

    def _get_tool_suffix_ids(self, tool_messages):
        if any(isinstance(message["content"], Ended) for message in tool_messages):
            return [self.eos_token_ids[0]] * (self.max_completion_length + 1)  # TRL ends a sample whose result does not fit
        return super()._get_tool_suffix_ids(tool_messages)
