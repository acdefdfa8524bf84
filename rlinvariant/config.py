"""The typed configuration tree: defaults, then the recipe's, then `key=value` from the command line.

`parse` turns argv into a `Config`, or into one list of everything that is wrong with it. It reads files and the
environment, but loads no model, opens no device and writes nothing.
"""

import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import chz
from chz.blueprint import Castable, InvalidBlueprintArg
from chz.tiepin import type_repr

from rlinvariant.arguments import model_problems
from rlinvariant.conflicts import conflicts, ppo_conflicts
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.files import RUNS


@chz.chz
class Data:
    """What a recipe lets the user set about its data: a recipe subclasses this, under the name `Data`."""


@chz.chz
class SamplerConfig:
    max_model_len: int | None = chz.field(default=None, doc="Longest prompt + completion, tokens; None: the model's.")
    max_num_seqs: int = chz.field(default=128, doc="Sequences decoded together.")
    max_num_batched_tokens: int | None = chz.field(default=None, doc="Tokens per engine step; None: vLLM's choice.")
    kv_cache_gib: float | None = chz.field(default=None, doc="KV cache, GiB; None: 1 on a CPU, an eighth of a GPU's memory.")
    enable_prefix_caching: bool = chz.field(default=True, doc="Reuse the KV cache of shared prefixes.")
    enforce_eager: bool | None = chz.field(
        default=None, doc="No compilation, no CUDA graphs; None: true on a CPU, where a start would take a minute longer."
    )


@chz.chz
class PPOConfig:
    """Of `algorithm=ppo`. The policy's clip range is `trainer.epsilon`, its learning rate `trainer.learning_rate`."""

    gamma: float = chz.field(default=1.0, doc="Discount per token, 0 to 1.")
    lam: float = chz.field(default=0.95, doc="GAE's lambda: 0 trusts the critic, 1 the rewards alone.")
    kl_coef: float = chz.field(
        default=0.0, doc="Reward lost per nat by which a token leaves the first policy; 0: no reference."
    )
    whiten_advantages: bool = chz.field(default=True, doc="Advantages of a rollout to mean 0, variance 1.")
    value_clip: float | None = chz.field(default=0.2, doc="Most that a value may gain by moving, in reward; None: no clipping.")
    critic: str | None = chz.field(default=None, doc="Hugging Face directory or hub id; None: a copy of the policy.")
    critic_learning_rate: float | None = chz.field(default=None, doc="None: trainer.learning_rate.")
    value_warmup_steps: int = chz.field(default=0, doc="First optimizer steps in which the critic alone learns.")
    target_kl: float | None = chz.field(
        default=None, doc="KL from the sampling policy above which the rest of a rollout is skipped."
    )


@chz.chz
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = chz.field(
        default="auto", doc="auto: online with a login, else offline; disabled where wandb is not installed."
    )
    project: str = chz.field(default="rlinvariant", doc="W&B project.")
    entity: str | None = chz.field(default=None, doc="W&B team or user.")
    group: str | None = chz.field(default=None, doc="W&B group.")
    tags: list[str] = chz.field(default_factory=list, doc="W&B tags, a,b,c.")


if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    TrainerConfig = GRPOConfig
    RecipeData = Any  # each recipe has a `Data` of its own
else:
    RecipeData = Data

    @chz.chz
    class TrainerConfig:
        """The fields of `trl.GRPOConfig`, unchanged; `trainer_config_class` fills them in."""


# GRPOConfig fields that this project sets itself: not in the tree; the reason is the error message.
_SAMPLER = "rlinvariant attaches its own vLLM; see sampler.*"
OWNED = {
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode"), _SAMPLER),
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"), _SAMPLER),
    **dict.fromkeys(("vllm_group_port", "vllm_tensor_parallel_size", "cache_implementation"), _SAMPLER),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_transformers_paged"), _SAMPLER),
    "transformers_continuous_batching_config": _SAMPLER,
    "vllm_structured_outputs_regex": "constrained decoding is not supported",
    "vllm_max_model_length": "use sampler.max_model_len",
    "vllm_gpu_memory_utilization": _SAMPLER,
    "vllm_importance_sampling_cap": "use trainer.vllm_importance_sampling_clip_max",
    "output_dir": "use run=NAME, which gives runs/NAME",
    "run_name": "use run=NAME",
    "resume_from_checkpoint": "use run=NAME resume=true",
    "num_train_epochs": "use steps=N",
    "model_init_kwargs": "use model= and dtype=",
    "use_cpu": "the device is found automatically",
    "max_tool_calling_iterations": "tools are not supported",
    "local_rank": "accelerate sets it",
}
ALIASES = {"trainer.max_steps": "steps", "trainer.seed": "seed"}
# Our defaults where they are not TRL's.
TRAINER_DEFAULTS = {
    "logging_steps": 1,  # one line of metrics per step
    "bf16": False,  # TRL's None switches autocast on
    "disable_tqdm": True,  # the console has its own line
    "dataloader_pin_memory": False,
    "vllm_importance_sampling_correction": False,  # nothing to correct when exact
}
# Fields that GRPOConfig types as `str`, checked by TRL only after the model is loaded.
TRAINER_CHOICES = {
    "loss_type": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo", "luspo"],
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": Literal["group", "batch", "none"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
}


@functools.cache
def trainer_config_class() -> type:
    """The chz class that has GRPOConfig's fields, types and defaults, with the changes in the tables above."""
    from trl.trainer.grpo_config import GRPOConfig

    namespace: dict[str, Any] = {"__annotations__": {}, "__module__": __name__, "__doc__": TrainerConfig.__doc__}
    for field in dataclasses.fields(GRPOConfig):
        if field.name in OWNED or f"trainer.{field.name}" in ALIASES or not field.init:
            continue
        doc = str(field.metadata.get("help", "")).split(". ")[0].rstrip(".")
        if field.name in TRAINER_DEFAULTS or field.default is not dataclasses.MISSING:
            namespace[field.name] = chz.field(default=TRAINER_DEFAULTS.get(field.name, field.default), doc=doc)
        else:
            namespace[field.name] = chz.field(default_factory=typing.cast(Any, field.default_factory), doc=doc)
        namespace["__annotations__"][field.name] = TRAINER_CHOICES.get(field.name, _without_str(field.type))
    return chz.chz(type("TrainerConfig", (TrainerConfig,), namespace))


def _without_str(annotation: Any) -> Any:
    """`Enum | str` accepts any string: keep the enum alone, so that a typo is seen."""
    members = typing.get_args(annotation)
    if any(isinstance(member, enum.EnumMeta) for member in members):
        return functools.reduce(lambda a, b: a | b, [member for member in members if member is not str])
    return annotation


@chz.chz
class Config:
    """One run. `sources` says where each value that is not a default came from."""

    recipe: str = chz.field(doc="Name of a file in recipes/, or a path to one.")
    model: str | None = chz.field(default=None, doc="Hugging Face directory or hub id; None: the recipe's own.")
    invariance: Literal["exact", "off", "sampler", "trainer"] = chz.field(
        default="exact", doc="Which sides run the invariant ops; sampler and trainer: that side only."
    )
    algorithm: Literal["grpo", "ppo"] = chz.field(default="grpo", doc="ppo: advantages of a critic, see ppo.*.")
    staleness: int = chz.field(
        default=0, doc="Optimizer steps by which the sampler's weights are older than the trainer's; 0: on policy."
    )
    steps: int = chz.field(default=100, doc="Optimizer steps.")
    seed: int = chz.field(default=0, doc="Seed of data order and sampling.")
    run: str = chz.field(default="", doc="Name under runs/; empty: recipe and time.")
    resume: bool = chz.field(default=False, doc="Continue the run named by run=.")
    dtype: Literal["bfloat16", "float32"] = chz.field(default="bfloat16", doc="Of compute; master weights are float32.")
    data: RecipeData
    trainer: TrainerConfig
    ppo: PPOConfig
    sampler: SamplerConfig
    wandb: WandbConfig
    sources: Mapping[str, str] = chz.field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return RUNS / self.run

    def load_recipe(self) -> "Recipe":
        return load_recipe(self.recipe)

    def grpo_config(self) -> "GRPOConfig":
        """Build TRL's own config. Touches the device and, under a launcher, starts the process group."""
        import torch
        from trl.trainer.grpo_config import GRPOConfig

        fields = {name: getattr(self.trainer, name) for name in chz.chz_fields(type(self.trainer))}
        if self.invariance in ("off", "sampler") and "trainer.bf16" not in self.sources:
            fields["bf16"] = self.dtype == "bfloat16"  # a stock trainer casts by autocast, as TRL does by default
        fields |= {"output_dir": str(self.run_dir / "checkpoints"), "max_steps": self.steps, "seed": self.seed}
        if (
            group := fields["num_generations"]
        ) == 1:  # PPO's; GRPOConfig asks for two that divide a rollout, so gets one that does
            steps = fields["steps_per_generation"] or fields["gradient_accumulation_steps"]
            fields["num_generations"] = fields["generation_batch_size"] or fields["per_device_train_batch_size"] * steps
            fields["num_generations_eval"] = fields["num_generations_eval"] or 1
        try:
            # Without use_cpu, accelerate does not see that several CPU processes belong together.
            args = GRPOConfig(use_cpu=not torch.cuda.is_available(), **fields)
        except ValueError as error:
            raise UserError("trainer.*: " + one_line(error)) from error
        args.num_generations = group
        return args

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Every value with its source, ready for JSON: {"trainer.beta": {"value": 0.0, "source": "default"}, ...}."""
        return {
            key: {"value": _plain(key, leaf.value), "source": self.sources.get(key, "default")}
            for key, leaf in _leaves(self).items()
        }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe file: module-level `datasets`, `reward_funcs`; optional `DEFAULTS`, `Data`, `prepare_model`, `check`."""

    name: str
    defaults: Mapping[str, Any]
    data: type[Data]
    datasets: Callable[..., Any]
    reward_funcs: Callable[..., Any]
    prepare_model: Callable[[Config], str] | None = None
    check: Callable[[Config], list[str]] | None = None


def recipe_names() -> list[str]:
    """Names of the packaged recipes, which are listed, not imported: no recipe is a dependency of this module."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "recipes")]))
    return sorted(name for name in names if not name.startswith("_"))  # _tiny.py and the like: what recipes share


@functools.cache
def load_recipe(recipe: str) -> Recipe:
    """Import a recipe by name or by path. Its own bugs keep their traceback."""
    if recipe.endswith(".py") or "/" in recipe:
        path = Path(recipe).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"recipe={recipe}: no such file; give the path of a recipe .py, or one of {_listed()}")
        name, module = path.stem, _import_file(path)
    else:
        if recipe not in recipe_names():
            hint = _suggest(recipe, recipe_names())
            raise UserError(f"recipe={recipe}: unknown recipe{hint}; there are: {_listed()}, or a path to a .py file")
        name, module = recipe, importlib.import_module(f"rlinvariant.recipes.{recipe}")
    missing = [function for function in ("datasets", "reward_funcs") if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(f"recipe={recipe}: does not define {' and '.join(missing)}; see recipes/arithmetic.py")
    return Recipe(
        name=name,
        defaults=getattr(module, "DEFAULTS", {}),
        data=getattr(module, "Data", Data),
        datasets=module.datasets,
        reward_funcs=module.reward_funcs,
        prepare_model=getattr(module, "prepare_model", None),
        check=getattr(module, "check", None),
    )


def _import_file(path: Path) -> types.ModuleType:
    # A name of its own: two files called my.py must not meet in sys.modules, where chz looks annotations up.
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Config:
    """Build the configuration of a run from `key=value` arguments.

    Args:
        argv: arguments without the program's name. `--help` prints every field, its value and its source.
        env: environment variables, read for conflicts and for the launcher's ranks.

    Raises:
        ConfigErrors: with one line per problem, all of them.
    """
    errors: list[str] = []
    given: dict[str, Any] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if argument == "--help":
            continue
        if not equals:
            errors.append(f"{argument}: expected key=value, e.g. steps=100")
        elif key.startswith("-"):
            errors.append(f"{argument}: expected key=value without dashes; write {argument.lstrip('-')}")
        else:
            given[key] = Castable(text)

    recipe = Recipe("", {}, Data, datasets=dict, reward_funcs=list)
    try:
        if "recipe" in given:
            recipe = load_recipe(given["recipe"].value)
        elif "--help" not in argv:
            errors.append(f"recipe: missing; write recipe=NAME with one of {_listed()}, or a path to a .py file")
    except UserError as error:
        errors.append(str(error))

    trainer = trainer_config_class()
    base = {"recipe": "", "data": recipe.data, "trainer": trainer, "ppo": PPOConfig, "sampler": SamplerConfig}
    base["wandb"] = WandbConfig
    blueprint = chz.Blueprint(Config).apply(base)
    sources: dict[str, str] = {}
    for source, layer in ((f"recipe {recipe.name}", recipe.defaults), ("command line", given)):
        origin = "" if source == "command line" else f"{source}: "
        layer, clashes = _resolve_aliases(layer)
        errors += [origin + clash for clash in clashes]
        known = _leaves(blueprint.make())
        for key, value in layer.items():
            if not recipe.name and key.startswith("data."):
                continue  # which keys there are is the recipe's to say, and the recipe is already an error
            if isinstance(value, str) and key in known and isinstance(known[key].type, enum.EnumMeta):
                value = Castable(value)  # a recipe names an enum's member as the command line does
            problem = _problem(key, value, known, blueprint)
            if problem:
                errors.append(origin + problem)
            else:
                blueprint.apply({key: value})
                sources[key] = source

    config: Config = blueprint.apply({"sources": sources}).make()
    if not config.run:
        config = chz.replace(config, run=_run_name(recipe.name or "run", env))
    errors += check(config, env, recipe) + _check_run(config, env)
    if "--help" in argv:
        print(_help(config))
        raise SystemExit(0)
    if errors:
        raise ConfigErrors(errors)
    return config


def _resolve_aliases(layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    clashes = [
        f"{key}={_shown(layer[key])} and {alias}={_shown(layer[alias])}: both set the same value; keep {key}"
        for alias, key in ALIASES.items()
        if alias in layer and key in layer
    ]
    return {ALIASES.get(key, key): value for key, value in layer.items()}, clashes


def _problem(key: str, value: Any, known: Mapping[str, "_Leaf"], blueprint: chz.Blueprint[Config]) -> str | None:
    """What is wrong with one `key=value`, or None."""
    owned = OWNED.get(key.removeprefix("trainer.")) if key.startswith("trainer.") else None
    if owned:
        return f"{key}={_shown(value)}: not a setting here; {owned}"
    if key not in known:
        by_name = [path for path in known if path.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        return f"{key}={_shown(value)}: unknown key{_suggest(key, by_name or [*known, *ALIASES], 0.0 if by_name else 0.6)}"
    try:
        blueprint.clone().apply({key: value}).make()
    except (InvalidBlueprintArg, TypeError):
        return f"{key}={_shown(value)}: expected {_expected(known[key].type)}; default {known[key].value!r}"
    return None


def check(config: Config, env: Mapping[str, str], recipe: Recipe | None = None) -> list[str]:
    """List what in a well-typed configuration cannot run, one line each: key, value, what is expected, the fix."""
    errors: list[str] = []
    trainer, sampler = config.trainer, config.sampler

    def require(ok: bool, key: str, expected: str) -> None:
        if not ok:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, name)
            errors.append(f"{key}={value}: expected {expected}")

    require(config.steps >= 1, "steps", "at least 1")
    require(0 <= config.seed < 2**32, "seed", "0 to 4294967295")
    require(config.staleness >= 0, "staleness", "0 or more optimizer steps")
    start = "0 with resume=True: the older weights are in no checkpoint; start a new run"
    require(not (config.resume and config.staleness > 0), "staleness", start)
    errors += _check_model(config, recipe)
    errors += _check_batches(config, int(env.get("WORLD_SIZE", 1)))
    if recipe is not None and recipe.check is not None:
        errors += recipe.check(config)

    errors += conflicts(trainer, config.invariance, env, "trainer.") + _check_ppo(config)
    length = trainer.max_completion_length
    require(length is not None and length >= 1, "trainer.max_completion_length", "at least 1")
    if sampler.max_model_len is not None and length is not None:
        least = f"more than trainer.max_completion_length={length}, to leave room for the prompt"
        require(sampler.max_model_len > length, "sampler.max_model_len", least)
    require(sampler.max_num_seqs >= 1, "sampler.max_num_seqs", "at least 1")
    require(sampler.kv_cache_gib is None or sampler.kv_cache_gib > 0, "sampler.kv_cache_gib", "more than 0")
    reports = trainer.report_to if isinstance(trainer.report_to, list) else [trainer.report_to]
    require(not {"wandb", "all"} & set(reports), "trainer.report_to", "no wandb or all: W&B is set by wandb.mode=")
    return errors


def _check_ppo(config: Config) -> list[str]:
    """PPO's settings, and that none is set where it would do nothing."""
    if config.algorithm == "ppo":
        found, path, first = (
            ppo_conflicts(config.trainer, config.ppo, "trainer."),
            config.ppo.critic,
            config.ppo.value_warmup_steps,
        )
        if first >= config.steps > 0:
            found.append(
                f"ppo.value_warmup_steps={first}: expected less than steps={config.steps}, or the policy learns nothing"
            )
        return found + ([] if path is None else model_problems("ppo.critic", path))
    # those of a recipe for PPO rest when the command line asks for GRPO
    rest = config.sources.get("algorithm") == "command line"
    return [
        f"{key}={getattr(config.ppo, key.removeprefix('ppo.'))}: expected algorithm=ppo, or it does nothing; remove it"
        for key, source in config.sources.items()
        if key.startswith("ppo.") and (source == "command line" or not rest)
    ]


def _check_batches(config: Config, processes: int) -> list[str]:
    """Batch sizes that TRL would refuse, told before anything is loaded."""
    trainer, errors = config.trainer, []
    group, per_device = trainer.num_generations, trainer.per_device_train_batch_size
    sizes = {"num_generations": (group, 1 if config.algorithm == "ppo" else 2), "num_iterations": (trainer.num_iterations, 1)}
    sizes["per_device_train_batch_size"] = (per_device, 1)
    sizes["gradient_accumulation_steps"] = (trainer.gradient_accumulation_steps, 1)
    for key, (value, least) in sizes.items():
        if value is None or value < least:
            reason = ": a group of one has no advantage" if key == "num_generations" else ""
            errors.append(f"trainer.{key}={value}: expected at least {least}{reason}")
    if trainer.auto_find_batch_size:
        errors.append("trainer.auto_find_batch_size=True: expected False; lower trainer.per_device_train_batch_size")
    if errors:
        return errors
    if trainer.generation_batch_size is not None and trainer.steps_per_generation is not None:
        a, b = trainer.generation_batch_size, trainer.steps_per_generation
        keys = f"trainer.generation_batch_size={a} and trainer.steps_per_generation={b}"
        return [f"{keys}: both set the size of a rollout; keep one"]
    global_batch = per_device * processes
    samples = trainer.generation_batch_size
    if samples is None:
        samples = global_batch * (trainer.steps_per_generation or trainer.gradient_accumulation_steps)
    elif samples % global_batch:
        fix = f"a multiple of trainer.per_device_train_batch_size x processes = {per_device} x {processes}"
        return [f"trainer.generation_batch_size={samples}: expected {fix}"]
    if samples < 2 and group == 1:
        return [f"trainer.per_device_train_batch_size={per_device}: expected a rollout of at least 2 samples; raise it"]
    if samples % typing.cast(int, group):
        shares = f"trainer.per_device_train_batch_size={per_device}, {processes} process(es)"
        made = f"the {samples} samples of a rollout ({shares})"
        return [f"trainer.num_generations={group}: expected a divisor of {made}; change one of them"]
    return []


def _check_model(config: Config, recipe: Recipe | None) -> list[str]:
    """The model named must be there, and be a whole model; a hub id is looked up later."""
    model = config.model
    if model is None:
        if recipe is None or not recipe.name or recipe.prepare_model:
            return []
        return [f"model: missing, recipe {recipe.name} has none of its own; write model=DIRECTORY or model=ORG/NAME"]
    return model_problems("model", model)


def _check_run(config: Config, env: Mapping[str, str]) -> list[str]:
    """A run directory is written once. Only the main process looks: it may have made it before the others get here."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", config.run):
        return [f"run={config.run}: expected a name of letters, digits, '.', '_' and '-'; it is a directory under runs/"]
    if config.resume and "run" not in config.sources:
        return ["resume=True: expected run=NAME too, the run to continue"]
    if "run" not in config.sources and env.get("WORLD_SIZE", "1") != env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")):
        return ["run: missing; with several hosts write run=NAME, so that all use one directory"]
    if env.get("RANK", "0") != "0":
        return []
    if config.resume and not config.run_dir.is_dir():
        return [f"run={config.run}: {config.run_dir} does not exist, nothing to resume; drop resume=true"]
    if not config.resume and (config.run_dir / "config.json").exists():
        return [f"run={config.run}: {config.run_dir} exists; choose another name, or add resume=true to continue it"]
    return []


def _run_name(recipe: str, env: Mapping[str, str]) -> str:
    """recipe-date-time. Under a launcher all ranks must agree, so the time is the one at which their parent started."""
    started = time.time()
    if env.get("WORLD_SIZE", "1") != "1":
        import psutil

        started = psutil.Process(os.getppid()).create_time()
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"


@dataclasses.dataclass(frozen=True)
class _Leaf:
    value: Any
    type: Any
    doc: str


def _leaves(config: Any, prefix: str = "") -> dict[str, _Leaf]:
    """Flatten a chz tree: dotted key -> value, type, doc."""
    leaves: dict[str, _Leaf] = {}
    for name, field in chz.chz_fields(config).items():
        value = getattr(config, name)
        if chz.is_chz(value):
            leaves |= _leaves(value, f"{prefix}{name}.")
        elif prefix + name != "sources":
            leaves[prefix + name] = _Leaf(value, field.final_type, field._doc)
    return leaves


def _help(config: Config) -> str:
    lines = ["train.py recipe=NAME [key=value ...]", f"recipes: {_listed()}, or a path to a .py file", ""]
    for key, leaf in _leaves(config).items():
        left = f"  {key}={_plain(key, leaf.value)}"
        lines.append(f"{left:<52} [{config.sources.get(key, 'default')}] {_expected(leaf.type)}. {leaf.doc}".rstrip())
    return "\n".join(lines)


def _plain(key: str, value: Any) -> Any:
    """A value as JSON can hold it."""
    if key.endswith("token") and value is not None:
        return "***"
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(key, item) for name, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _shown(value: Any) -> str:
    return value.value if isinstance(value, Castable) else str(value)


def _expected(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if isinstance(annotation, enum.EnumMeta):
        return "one of " + ", ".join(str(member.value) for member in list[Any](annotation))
    return type_repr(annotation)


def _listed() -> str:
    return ", ".join(recipe_names())


def _suggest(word: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(word, list(options), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""
