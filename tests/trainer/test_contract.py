"""The parts of TRL that our trainers override, call and read: an upgrade that moves one fails here, by name."""

import ast
import inspect
import re
import textwrap

import pytest
import trl
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rlinvariant.trainer import InvariantGRPOTrainer, InvariantPPOTrainer, checkpointed, drawing, episodes, finite
from rlinvariant.trainer.checkpointed import CheckpointedTrainer
from rlinvariant.trainer.drawing import DrawingTrainer
from rlinvariant.trainer.episodes import EpisodesTrainer
from rlinvariant.trainer.finite import FiniteTrainer
from tests.trees import parsed

# Leading parameters of each method of GRPOTrainer that is overridden, in TRL's order: ours are called with these.
OVERRIDDEN = {
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_tool_call_loop": ["self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs"],
    "_get_tool_suffix_ids": ["self", "tool_messages"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ],
    "_compute_loss": ["self", "model", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_high_entropy_mask": ["self", "entropies", "mask", "threshold"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "evaluation_loop": ["self", "dataloader"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_output_dir": ["self", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_init_training_state": ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint"],
    "_get_train_sampler": ["self", "dataset"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_load_best_model": ["self"],
    "log": ["self", "logs", "start_time"],
    "create_optimizer": ["self", "model"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "create_accelerator_and_postprocess": ["self"],
    "_build_accelerator_args": ["self", "kwargs"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],  # called, as is the next
    "_determine_best_metric": ["self", "metrics", "trial"],
}
# Attributes that TRL sets and ours reads, and a piece of the source that shows what they mean.
READ = {
    "beta": "self.beta = args.beta",
    "num_iterations": "self.num_iterations = args.num_iterations",
    "_step": "self._step = 0",
    "_buffered_inputs": "self._buffered_inputs = None",
    "temperature": "self.temperature = args.temperature",
    "max_completion_length": "self.max_completion_length = args.max_completion_length",
    "num_generations": "self.num_generations = args.num_generations",
    "eos_token_ids": "self.eos_token_ids",
    "ref_model": "self.ref_model",
    "use_vllm": "self.use_vllm = args.use_vllm",
    "vllm_importance_sampling_clip_max": "self.vllm_importance_sampling_clip_max",
    "reward_funcs": "self.reward_funcs = reward_funcs",
    "reward_weights": "self.reward_weights",
    "reward_func_names": "self.reward_func_names = ",
    "_tokenizer": "self._tokenizer",
    "_metrics": "self._metrics",
    "_logs": "self._logs",
    "_pending_metrics": "self._pending_metrics = defaultdict(list)",
    "_pending_extra_logs": "self._pending_extra_logs = defaultdict(list)",
    "_standalone_tools": "self._standalone_tools = tools",
    "_environment_pool": "self._environment_pool[name] = [instance]",
    "environment_factories": "self.environment_factories = {None: environment_factory}",
    "_multi_environment": "self._multi_environment = isinstance(environment_factory, dict)",
}
OF_TOOLS = (  # what `trainer.episodes` relies on: which calls go where, how a reset is called, what ends a sample
    "sync_tool_dict = self._sync_tool_dicts[idx_with_tool]",
    "if name in sync_tool_dict:",
    "async_tool_dict = self._async_tool_dicts[idx_with_tool]",
    "content = result if isinstance(result, list) else str(result)",
    "suffix_ids = self._get_tool_suffix_ids(tool_messages)",
    "len(pct) - len(prompt_ids[i]) > self.max_completion_length",
    "pool.append(self.environment_factories[name]())",
    'self._batch_environments = [x.get("environment") if self._multi_environment else None for x in inputs]',
    "observation = environment.reset(**reset_kwargs)",
)
ENTROPY = (
    "self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)",
    "apply_coef = self.entropy_coef if self._last_world_entropy <= self.args.entropy_target else 0.0",
    "(entropies * effective_mask).sum() / effective_mask.sum().clamp(min=1.0) / accumulation_factor",
    "loss = loss - apply_coef * entropy_loss",
)
OUTPUTS = ("old_per_token_logps", "sampling_per_token_logps", "completion_ids", "completion_mask", "prompt_ids", "advantages")
FIELDS = (
    "use_vllm",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logging_steps",
    "bf16",
    "fp16",
    "use_liger_kernel",
    "cast_lm_head_to_fp32",
    "torch_compile",
    "seed",
    "steps_per_generation",
    "gradient_accumulation_steps",
    "num_iterations",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "loss_type",
)


def source(function) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def test_trl_is_the_version_that_was_read():
    assert trl.__version__.startswith("1.16."), f"TRL {trl.__version__}: read its GRPOTrainer again, then these tests"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_have_the_signature_expected(name):
    assert hasattr(GRPOTrainer, name), f"GRPOTrainer.{name} is gone"
    parameters = list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name))).parameters)
    expected = OVERRIDDEN[name]
    assert parameters[: len(expected)] == expected, f"GRPOTrainer.{name} takes {parameters}"


def test_every_override_is_under_contract():
    kinds = [kind for kind in InvariantPPOTrainer.__mro__ if issubclass(kind, GRPOTrainer) and kind is not GRPOTrainer]
    members = {name: value for kind in kinds for name, value in vars(kind).items()}
    ours = {name for name, value in members.items() if hasattr(GRPOTrainer, name) and inspect.isfunction(value)}
    ours -= {"__init__", "train", "create_model_card", "init_hf_repo", "push_to_hub"}  # of public signature
    assert ours <= set(OVERRIDDEN), f"{ours - set(OVERRIDDEN)}: overridden, and not listed above"


@pytest.mark.parametrize("kind", [InvariantGRPOTrainer, InvariantPPOTrainer])
def test_the_module_says_which_methods_are_overridden(kind):
    overridden = {name for name, value in vars(kind).items() if hasattr(GRPOTrainer, name) and inspect.isfunction(value)}
    table = [line for line in inspect.getmodule(kind).__doc__.splitlines() if line.startswith("    ")]
    told = {name for line in table for name in re.split("  +", line.strip())[0].split(", ")}
    assert told == overridden - {"__init__"}
    assert f"{ {8: 'Eight', 10: 'Ten'}[len(told)] } of TRL's" in inspect.getmodule(kind).__doc__.replace(" methods of", " of")


@pytest.mark.parametrize(
    ("kind", "module"),
    [(CheckpointedTrainer, checkpointed), (FiniteTrainer, finite), (DrawingTrainer, drawing), (EpisodesTrainer, episodes)],
)
def test_the_modules_below_say_so_too(kind, module):
    overridden = {n for n, value in vars(kind).items() if hasattr(GRPOTrainer, n) and inspect.isfunction(value)}
    table = (module.__doc__ or "").partition("that are overridden:")[2]
    for name in overridden:
        assert re.search(rf"^    .*\b{name}\b", table, re.MULTILINE), name


def test_what_stops_at_nan_relies_on():
    """The gradients are looked at before transformers clips them, and only a callback is between that look and the step."""
    loop = source(Trainer._run_epoch)
    calls = ("self.training_step(", "self._clip_grad_norm(", "self._get_grad_norm(", "self.optimizer.step()")
    places = [loop.index(call) for call in calls]
    assert places == sorted(places) and loop.count("optimizer.step()") == 1


def test_what_a_checkpoint_relies_on():
    """Transformers and TRL keep the order of saving and the time of restoring generators, and one sampler draws all epochs."""
    saving = source(Trainer._save_checkpoint)
    order = (
        "self.save_model(",
        "self.state.best_model_checkpoint = ",
        "self._save_optimizer_and_scheduler(",
        "self._save_rng_state(",
        "self.state.save_to_json(",
    )
    places = [saving.index(call) for call in order]
    assert places == sorted(places)
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in source(Trainer._prepare_for_training)
    assert source(Trainer._run_epoch).count("self._load_rng_state(resume_from_checkpoint)") == 2
    assert "torch.randperm(self.num_samples, generator=self.generator)" in source(RepeatSampler.__iter__)
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source(GRPOTrainer._prepare_inputs)


@pytest.mark.parametrize("piece", OF_TOOLS)
def test_tools_are_called_as_the_guard_expects(piece):
    assert piece in source(GRPOTrainer), f"GRPOTrainer no longer says {piece!r}"


@pytest.mark.parametrize("name", READ)
def test_attributes_that_are_read_are_set_by_trl(name):
    assert READ[name] in source(GRPOTrainer.__init__), f"GRPOTrainer.__init__ no longer sets {name} as expected"


@pytest.mark.parametrize("piece", ENTROPY)
def test_the_loss_takes_entropies_as_expected(piece):
    assert piece in source(GRPOTrainer._compute_loss)


@pytest.mark.parametrize("key", OUTPUTS)
def test_a_scored_rollout_has_the_keys_expected(key):
    assert f'"{key}"' in source(GRPOTrainer._generate_and_score_completions), f"a rollout has no {key}"


def test_log_probs_have_one_leaf():
    """Policy, old policy and reference all go through `_get_per_token_logps_and_entropies`, with no other forward beside it."""
    for method, calls in {"_generate_and_score_completions": 3, "_compute_loss": 1}.items():
        tree = parsed(source(getattr(GRPOTrainer, method)))
        names = [n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        assert names.count("_get_per_token_logps_and_entropies") == calls, f"{method}: log-probs are computed elsewhere"
        assert "forward" not in names and not [
            n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "unwrapped_model"
        ]


def test_the_leaf_gives_log_probs_entropies_and_an_auxiliary_loss():
    returned = [
        node.value
        for node in ast.walk(parsed(source(GRPOTrainer._get_per_token_logps_and_entropies)))
        if isinstance(node, ast.Return)
    ]
    assert returned and all(isinstance(value, ast.Tuple) and len(value.elts) == 3 for value in returned)


def test_a_rollout_returns_ids_and_log_probs():
    assert "completion_ids, logprobs = self._generate_single_turn(" in source(GRPOTrainer._generate)
    returned = "return prompt_ids, completion_ids, tool_mask, completions, logprobs, "
    assert returned in source(GRPOTrainer._generate)


def test_what_turns_rely_on():
    """A turn goes on with the samples whose last message is a tool's, in order; its prompt is their tokens and more."""
    loop = source(GRPOTrainer._tool_call_loop)
    assert "completions[idx_with_tool].append(tool_message)" in loop
    assert "del completions[idx_with_tool][completions_len_before[idx] :]" in loop
    assert "prompt_ids[idx_with_tool] + completion_ids[idx_with_tool] + suffix_ids" in loop
    assert "self.vllm_generation.llm.llm_engine.model_config.max_model_len" in loop
    assert "gather" not in loop.replace("asyncio.gather", "")  # a rank with more turns than others waits for none
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in source(GRPOTrainer._generate)


def test_log_probs_of_a_rollout_are_kept_for_the_comparison():
    """`use_vllm` is what makes TRL keep the sampler's log-probs apart and apply its correction."""
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "sampling_per_token_logps_list" in text and "self.use_vllm and self.vllm_importance_sampling_correction" in text


def test_what_ppo_relies_on():
    """Advantages per token, a KL term and a reference by `beta` alone, a mean over tokens, and no gradient of ours to clear."""
    loss = source(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1:" in loss and loss.count("if self.beta != 0.0:") == 3
    assert "if self.beta != 0.0:" in source(GRPOTrainer._generate_and_score_completions)
    assert 'if mode == "train":' in loss and 'normalizer = inputs["num_items_in_batch"].clamp(min=1.0)' in loss
    every = source(GRPOTrainer._prepare_inputs)
    assert "self._step % generate_every == 0" in every and "self.args.steps_per_generation * self.num_iterations" in every


@pytest.mark.parametrize("name", FIELDS)
def test_config_fields_exist(name):
    assert name in GRPOConfig.__dataclass_fields__, f"GRPOConfig has no {name}"


def test_trl_puts_a_fused_head_on_the_instance():
    """Ours removes it: `self.model.__dict__.pop("forward")`. Were it installed otherwise, it would stay."""
    assert ".forward = " in inspect.getsource(inspect.getmodule(GRPOTrainer)), "TRL no longer sets model.forward"
