"""The `trainer.*` fields: those of `trl.GRPOConfig`, out of a table, so that no command line has to import TRL.

The package has the table of the versions it is tested with: trl_fields.json, which trl_fields.py writes. Where other versions
are installed, the table is made of the class itself, once, and kept in the user's cache directory.
"""

import functools
import json
import operator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import chz

from rlinvariant.files import cache_dir, write_atomically

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    class TrainerConfig(GRPOConfig):
        """Holds the fields of `trl.GRPOConfig` and of `TRAINER_OWN`."""

        tokens_per_microbatch: int | None = None
else:

    @chz.chz
    class TrainerConfig:
        """Holds the fields of `trl.GRPOConfig`, unchanged; `trainer_config_class` fills them in."""


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
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "local_rank": "accelerate sets it",
    "enable_jit_checkpoint": "SIGTERM saves the step in progress without it",
    "hub_token": "it would be written into every checkpoint; set HF_TOKEN in the environment, or run `hf auth login`",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "use machine=8gpu_fsdp2, or an accelerate file like it"),
}
"""Fields of GRPOConfig that this project sets itself, and that are not in the tree -> the reason, for the error message."""
ALIASES = {"trainer.max_steps": "steps", "trainer.seed": "seed"}
"""Key that is accepted -> the key whose value it is."""
TRAINER_DEFAULTS = {
    "logging_steps": 1,  # one line of metrics per step
    "bf16": False,  # TRL's None switches autocast on
    "disable_tqdm": True,  # the console has its own line
    "dataloader_pin_memory": False,
    "save_steps": 0.1,  # ten checkpoints a run, of which two are kept: HF's 500 steps are more than most runs have
    "save_total_limit": 2,
    "vllm_importance_sampling_correction": False,  # nothing to correct when exact
}
"""Our defaults where they are not TRL's."""
TRAINER_OWN: dict[str, tuple[Any, Any, str]] = {
    "tokens_per_microbatch": (
        int | None,
        None,
        "Most tokens of a forward and backward of an exact trainer, whatever the batch sizes; None: as many as fit.",
    )
}
"""Fields of ours among them: type, default, what each is for."""
TRAINER_CHOICES = {
    "loss_type": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo", "luspo"],
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": Literal["group", "batch", "none"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
}
"""Fields that GRPOConfig types as `str`, and whose values TRL checks only after the model is loaded."""

Table = dict[str, Any]
"""{"versions": {package: version}, "fields": [{"name", "types", "choices", "default", "doc"}, ...]}, as in the JSON file."""
PACKAGED_TABLE = Path(__file__).with_name("trl_fields.json")
TYPES: dict[str, Any] = {
    "None": type(None),
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "dict": dict,
    "dict[str, Any]": dict[str, Any],
    "dict[str, bool]": dict[str, bool],
    "list[str]": list[str],
    "list[float]": list[float],
}
"""Name in the table -> type. A member of a union that is none of these has no text form, and is left out."""


def installed() -> dict[str, str]:
    """Return the versions that decide which fields there are: GRPOConfig is TRL's, and most of it transformers'."""
    return {package: version(package) for package in ("trl", "transformers")}


def table() -> Table:
    """Return the fields of the GRPOConfig that is installed, from the package, the user's cache, or the class."""
    versions = installed()
    found = _read(PACKAGED_TABLE)
    if found["versions"] == versions:
        return found
    directory = cache_dir()
    cached = directory / f"trl-{versions['trl']}-transformers-{versions['transformers']}.json"
    if cached.is_file():
        return _read(cached)
    from rlinvariant.config.trl_fields import as_json, table_of_class  # TRL takes seconds

    found = table_of_class()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, as_json(found), shared=True)
    except OSError:
        pass  # a cache that cannot be written costs the next start some seconds
    return found


def _read(path: Path) -> Table:
    return json.loads(path.read_text())


@functools.cache
def trainer_config_class() -> type:
    """Build the chz class that has GRPOConfig's fields, types and defaults, with the changes of the constants above."""
    namespace: dict[str, Any] = {"__annotations__": {}, "__module__": __name__, "__doc__": TrainerConfig.__doc__}
    for field in table()["fields"]:
        name = field["name"]
        if name in OWNED or f"trainer.{name}" in ALIASES:
            continue
        default = TRAINER_DEFAULTS.get(name, field["default"])
        kinds = [TYPES[kind] for kind in field["types"]]
        kinds += [Literal[tuple(field["choices"])]] if field["choices"] else []
        namespace["__annotations__"][name] = TRAINER_CHOICES.get(name, functools.reduce(operator.or_, kinds))
        # a list is made anew for each tree
        given: Any = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
        namespace[name] = chz.field(**given, doc=field["doc"])
    for name, (kind, default, doc) in TRAINER_OWN.items():
        namespace["__annotations__"][name], namespace[name] = kind, chz.field(default=default, doc=doc)
    return chz.chz(type("TrainerConfig", (TrainerConfig,), namespace))
