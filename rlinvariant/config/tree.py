"""The tree of a run's settings: `Config` and its parts."""

import dataclasses
import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import chz

from rlinvariant.arguments import SCRIPT
from rlinvariant.config.fields import TRAINER_OWN, TrainerConfig
from rlinvariant.config.named import Named, named
from rlinvariant.config.recipe import Data, Recipe, load_recipe
from rlinvariant.errors import UserError, one_line
from rlinvariant.files import RUNS
from rlinvariant.kernels.choice import AUTO, Attention
from rlinvariant.masking import masked
from rlinvariant.rewards import RewardLimits
from rlinvariant.text import shown
from rlinvariant.tools.limits import ToolLimits
from rlinvariant.types import EnvironmentFactory, Json, JsonObject, RewardCall, ToolCall, Untyped

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    RecipeData = Any  # each recipe has a `Data` of its own
else:
    RecipeData = Data


@chz.chz
class SamplerConfig:
    """Holds the settings of vLLM, `sampler.*`."""

    max_model_len: int | None = chz.field(default=None, doc="Longest prompt + completion, tokens; None: the model's.")
    max_num_seqs: int = chz.field(default=128, doc="Sequences decoded together.")
    max_num_batched_tokens: int | None = chz.field(default=None, doc="Tokens per engine step; None: vLLM's choice.")
    kv_cache_gib: float | None = chz.field(default=None, doc="KV cache, GiB; None: 1 on a CPU, an eighth of a GPU's memory.")
    enable_prefix_caching: bool = chz.field(default=True, doc="Reuse the KV cache of shared prefixes.")
    enforce_eager: bool | None = chz.field(
        default=None, doc="No compilation, no CUDA graphs; None: true on a CPU, where a start would take a minute longer."
    )
    tensor_parallel_size: int = chz.field(
        default=1,
        doc="Processes over which an engine is spread, each with some columns of every product; the bits are those of 1.",
    )
    servers: list[str] = chz.field(
        default_factory=list,
        doc="Addresses of `rlinvariant serve`s to draw from, http://HOST:PORT,...; none: an engine in the trainer's process.",
    )
    trainer_token_file: str | None = chz.field(default=None, doc="File with the token that these servers were started with.")


@chz.chz
class PPOConfig:
    """Holds the settings of PPO, `ppo.*`. The policy's clip range is `trainer.epsilon`, its rate `trainer.learning_rate`."""

    gamma: float = chz.field(default=1.0, doc="Discount per token, 0 to 1.")
    lam: float = chz.field(default=0.95, doc="GAE's lambda: 0 trusts the critic, 1 the rewards alone.")
    kl_coef: float = chz.field(
        default=0.0, doc="Reward lost per nat by which a token leaves the first policy; 0: no reference."
    )
    whiten_advantages: bool = chz.field(default=True, doc="Advantages of a rollout to mean 0, variance 1.")
    value_clip: float | None = chz.field(default=0.2, doc="Most that a value may gain by moving, in reward; None: no clipping.")
    critic: str | None = chz.field(
        default=None, doc="Hugging Face directory or hub id; None: a copy of the policy, or, with LoRA, of its adapters."
    )
    critic_learning_rate: float | None = chz.field(default=None, doc="None: trainer.learning_rate.")
    value_warmup_steps: int = chz.field(default=0, doc="First optimizer steps in which the critic alone learns.")
    target_kl: float | None = chz.field(
        default=None, doc="KL from the sampling policy above which the rest of a rollout is skipped."
    )


@chz.chz
class LoraConfig:
    """Holds the settings of LoRA adapters, `lora.*`, by PEFT's names. The base is frozen, in `dtype`; adapters are float32."""

    r: int = chz.field(default=0, doc="Rank of the adapters; 0: none, all weights are trained.")
    alpha: int | None = chz.field(default=None, doc="An adapter's product is multiplied by alpha / r; None: 2 r.")
    target_modules: list[str] = chz.field(
        default_factory=lambda: ["all-linear"],
        doc="Projections with an adapter: names, q_proj,v_proj; all-linear, all but lm_head; or a regular expression.",
    )
    use_rslora: bool = chz.field(default=False, doc="Multiply by alpha / sqrt(r) instead.")

    def settings(self) -> str:
        """Return the settings that are no defaults, as they are written behind `--lora`."""
        given, default = chz.asdict(self), chz.asdict(LoraConfig())
        texts = {key: ",".join(value) if isinstance(value, list) else value for key, value in given.items()}
        return " ".join(f"{key}={texts[key]}" for key in given if given[key] != default[key])

    def peft_config(self) -> Untyped:
        """Return PEFT's own configuration; None: no adapters."""
        if not self.r:
            return None
        from peft import LoraConfig as PeftLoraConfig

        names = self.target_modules
        whole = names == ["all-linear"] or (len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]))
        targets = names[0] if whole else names  # as PEFT tells them apart: a string is matched with whole names
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return PeftLoraConfig(
            r=self.r, lora_alpha=alpha, target_modules=targets, use_rslora=self.use_rslora, task_type="CAUSAL_LM"
        )


@chz.chz
class WandbConfig:
    """Holds the settings of W&B, `wandb.*`."""

    mode: Literal["auto", "online", "offline", "disabled"] = chz.field(
        default="auto", doc="auto: online with a login, else offline; disabled where wandb is not installed."
    )
    project: str = chz.field(default="rlinvariant", doc="W&B project.")
    entity: str | None = chz.field(default=None, doc="W&B team or user.")
    group: str | None = chz.field(default=None, doc="W&B group.")
    tags: list[str] = chz.field(default_factory=list, doc="W&B tags, a,b,c.")


@chz.chz
class Config:
    """Describes one run. `sources` says where each value that is not a default came from."""

    recipe: str = chz.field(
        default="", doc="Name of a file in recipes/, or a path to one; empty: data.path and reward say what is trained."
    )
    model: str | None = chz.field(default=None, doc="Hugging Face directory or hub id; None: the recipe's own.")
    reward: list[str] = chz.field(
        default_factory=list,
        doc="Reward functions, FILE.py:FUNCTION or MODULE:FUNCTION, in place of the recipe's; weights: trainer.reward_weights.",
    )
    invariance: Literal["exact", "off", "sampler", "trainer"] = chz.field(
        default="exact", doc="Which sides run the invariant ops; sampler and trainer: that side only."
    )
    algorithm: Literal["grpo", "ppo"] = chz.field(default="grpo", doc="ppo: advantages come from a critic, see ppo.*.")
    staleness: int = chz.field(
        default=0, doc="Optimizer steps by which the sampler's weights are older than the trainer's; 0: on policy."
    )
    gradients: Literal["stock", "ordered", "invariant"] = chz.field(
        default="stock",
        doc="How gradients are added: stock: over processes as NCCL or gloo does; ordered: in a fixed order of the ranks; "
        "invariant: sample by sample, so that neither processes nor micro-batches are in the bits.",
    )
    reward_timeout: float = chz.field(default=600.0, doc="Seconds that a call of a reward function may take; 0: no limit.")
    reward_cage: int = chz.field(
        default=0, doc="Processes of its own that each reward function runs in, so that a crash is survived; 0: the trainer's."
    )
    reward_errors: Literal["stop", "zero", "none"] = chz.field(
        default="stop", doc="Where a reward function fails on a sample: end the run, give 0, or leave the sample out."
    )
    tools: list[str] = chz.field(
        default_factory=list,
        doc="Tools that the model may call, FILE.py:FUNCTION or MODULE:FUNCTION, in place of the recipe's.",
    )
    environment: str | None = chz.field(
        default=None,
        doc="What makes an environment, FILE.py:CLASS or MODULE:CLASS, in place of the recipe's; its methods are tools.",
    )
    tool_format: Literal["template", "plain"] = chz.field(
        default="template", doc="Form of a call: of the model's own chat template, or plain text, which any model can write."
    )
    tool_timeout: float = chz.field(default=60.0, doc="Seconds that a call of a tool or environment may take; 0: no limit.")
    tool_cage: bool = chz.field(
        default=False, doc="Whether each tool runs in a process of its own, so that a crash is survived; environments do not."
    )
    tool_errors: Literal["tell", "end", "stop"] = chz.field(
        default="tell", doc="Where a tool fails: tell the model, end that completion, or end the run."
    )
    steps: int = chz.field(default=100, doc="Optimizer steps.")
    seed: int = chz.field(default=0, doc="Seed of data order and sampling.")
    run: str = chz.field(default="", doc="Name under runs/; empty: recipe and time.")
    resume: bool | Literal["force"] = chz.field(
        default=False, doc="Continue the run named by run=; force: also with settings that make another run of it."
    )
    save_minutes: float | None = chz.field(
        default=30.0, doc="Longest time between two checkpoints, minutes, beside trainer.save_steps; None: no such limit."
    )
    completions_gib: float | None = chz.field(
        default=1.0,
        doc="Most that RUN/completions may take, GiB: beyond it older steps are thinned out; None: no limit; 0: keep none.",
    )
    dtype: Literal["bfloat16", "float32"] = chz.field(
        default="bfloat16", doc="Type that both sides compute in; master weights are float32."
    )
    attention: Attention = chz.field(
        default=AUTO,
        doc="On a GPU, of both sides: flash: FlashAttention-3; chunked: our own, for few and long requests; auto: by model.",
    )
    unproven_gpu: bool = chz.field(
        default=False,
        doc="Whether a GPU, or a release on it, may be tried on which exact mode has not been proven: all is compared first.",
    )
    save_dtype: Literal["model", "bfloat16", "float16", "float32"] = chz.field(
        default="model", doc="Type of the weights in RUN/model; model: as they came. Checkpoints keep the float32 masters."
    )
    data: RecipeData
    trainer: TrainerConfig
    ppo: PPOConfig
    lora: LoraConfig
    sampler: SamplerConfig
    wandb: WandbConfig
    sources: Mapping[str, str] = chz.field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """Return the run's directory, relative to the working directory."""
        return RUNS / self.run

    @property
    def again(self) -> str:
        """Say how to go on with the run: the command, or what to write into its script, which the command cannot start."""
        if self.sources.get("run") == SCRIPT:
            return f"resume=True beside run= in {shown(self.recipe)}"
        return f"rlinvariant resume {self.run_dir}"

    @property
    def reward_limits(self) -> RewardLimits:
        """Return what the run allows its reward functions."""
        return RewardLimits(self.reward_timeout, self.reward_cage, self.reward_errors)

    @property
    def tool_limits(self) -> ToolLimits:
        """Return what the run allows its tools and environments."""
        return ToolLimits(self.tool_timeout, self.tool_cage, self.tool_errors)

    @property
    def recompute(self) -> bool | None:
        """Return what was said of recomputing activations, by user or recipe; None: nothing, or the trainer is stock."""
        names = {"trainer.gradient_checkpointing", "trainer.activation_checkpointing"}  # the second since transformers 5.24
        said = bool(names & self.sources.keys()) and self.invariance in ("exact", "trainer")
        return self.trainer.gradient_checkpointing if said else None

    def load_recipe(self) -> Recipe:
        """Return the recipe's functions and defaults."""
        return load_recipe(self.recipe)

    def reward_funcs(self) -> list[RewardCall]:
        """Return the reward functions that the user names, or the recipe's."""
        return [named("reward", name).value for name in self.reward] or list(self.load_recipe().reward_funcs(self))

    def tool_funcs(self) -> list[ToolCall]:
        """Return the tools that the user names, or the recipe's; none where there are none."""
        made = self.load_recipe().tools
        return [named("tools", name).value for name in self.tools] or (list(made(self)) if made is not None else [])

    def environment_factory(self) -> EnvironmentFactory | None:
        """Return what makes an environment, by the user's name for it or the recipe's own; None where there is none."""
        made = self.load_recipe().environment
        if self.environment is not None:
            return named("environment", self.environment).value
        return None if made is None else made(self)

    def named(self) -> list[tuple[str, str, Named]]:
        """Return what the user's settings name: what it is, its name, and what was imported."""
        given = [("reward", name) for name in self.reward] + [("tools", name) for name in self.tools]
        given += [] if self.environment is None else [("environment", self.environment)]
        return [(key.removesuffix("s"), name, named(key, name)) for key, name in given]

    def grpo_config(self) -> "GRPOConfig":
        """Build TRL's own config. Touches the device and, under a launcher, starts the process group.

        Raises:
            UserError: TRL refuses a value.
        """
        import torch
        from trl.trainer.grpo_config import GRPOConfig

        fields = {name: getattr(self.trainer, name) for name in chz.chz_fields(type(self.trainer)) if name not in TRAINER_OWN}
        if self.invariance in ("off", "sampler") and "trainer.bf16" not in self.sources:
            fields["bf16"] = self.dtype == "bfloat16"  # a stock trainer casts by autocast, as TRL does by default
        fields |= {"output_dir": str(self.run_dir / "checkpoints"), "max_steps": self.steps, "seed": self.seed}
        fields["run_name"] = self.run  # by which a tracker goes on with a resumed run
        group = fields["num_generations"]
        if group == 1:  # PPO's; GRPOConfig asks for two that divide a rollout, so gets one that does
            steps = fields["steps_per_generation"] or fields["gradient_accumulation_steps"]
            fields["num_generations"] = fields["generation_batch_size"] or fields["per_device_train_batch_size"] * steps
            fields["num_generations_eval"] = fields["num_generations_eval"] or 1
        try:
            # Without use_cpu, accelerate does not see that several CPU processes belong together.
            args = GRPOConfig(use_cpu=not torch.cuda.is_available(), **fields)
        except Exception as error:  # a value of a right type and a wrong meaning: each of these raises a type of its own
            cause = one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"trainer.*: {cause}; change or remove the setting") from error
        args.num_generations = group
        return args

    def resolved(self) -> dict[str, JsonObject]:
        """Return every value with its source for JSON: {"trainer.beta": {"value": 0.0, "source": "default"}, ...}."""
        return {
            key: {"value": plain(key, leaf.value), "source": self.sources.get(key, "default")}
            for key, leaf in leaves(self).items()
        }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Holds one setting of a tree: its value, the type it must have, and what it is for."""

    value: Any
    type: Any
    doc: str


def leaves(config: object, prefix: str = "") -> dict[str, Leaf]:
    """Flatten a chz tree: dotted key -> leaf."""
    found: dict[str, Leaf] = {}
    for name, field in chz.chz_fields(config).items():
        value = getattr(config, name)
        if chz.is_chz(value):
            found |= leaves(value, f"{prefix}{name}.")
        elif prefix + name != "sources":
            found[prefix + name] = Leaf(value, field.final_type, field._doc)
    return found


def plain(key: str, value: Json) -> Json:
    """Return a value as JSON can hold it; a secret is not shown."""
    value = masked(key, value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(key, item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(key, item) for name, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
