"""Arguments of a script: a wrong name, or a value of another kind, is one line before anything is loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import GRPOConfig

import rlinvariant
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer.interface import SamplerOptions
from rlinvariant.trainer.preflight.given import CHECKED, KINDS, NAMES, given_problems
from tests.parity.device import CUDA
from tests.parity.harness import new_trainer, questions, variety

FOREIGN = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"stalenes": 1}, "stalenes: no such argument; did you mean staleness?"),
        (
            {"sampler_options": {"max_modellen": 8}},
            "sampler_options.max_modellen: no such argument; did you mean max_",
        ),
        ({"sampler_options": [8]}, "sampler_options=[8] (list): expected a dict of max_model_len, kv_cache_gib, options"),
        (
            {"sampler_options": {"kv_cache_gib": "1"}},
            "sampler_options.kv_cache_gib='1' (str): expected a number of GiB, or None",
        ),
        ({"sampler_options": {"options": [1]}}, "sampler_options.options=[1] (list): expected a dict of arguments"),
        (
            {"optimizers": FOREIGN},
            "optimizers=SGD ( Paramet...ght_decay: 0 ) (SGD): expected a pair (optimizer, scheduler), each of which",
        ),
        ({"callbacks": "x"}, "callbacks='x' (str): expected a list of callbacks"),
        ({"run": list(range(10**6))}, "run=[0, 1, 2, 3, 4, 5, ...] (list): expected a name under runs/, or None"),
        ({"run": "x" * 99, "staleness": ["\x1b[2J" * 99]}, "staleness=['\\x1b[2J"),
        ({"staleness": "2"}, "staleness='2' (str): expected a number of optimizer steps"),
        (
            {"tokens_per_microbatch": "x"},
            "tokens_per_microbatch='x' (str): expected a number of tokens, or None: as many as fit",
        ),
        ({"recompute": "x"}, "recompute='x' (str): expected True, False, or None: as memory needs it"),
        ({"rollout_func": 3}, "rollout_func=3 (int): expected a function, or None"),
        ({"ppo": {"kl_coef": 0.1}}, "ppo={'kl_coef': 0.1} (dict): expected a PPOConfig; write ppo=PPOConfig(...)"),
        (
            {"processing_class": "name"},
            "processing_class='name' (str): expected a tokenizer, as of AutoTokenizer.from_pretrained",
        ),
        ({"run": 3}, "run=3 (int): expected a name under runs/, or None"),
        ({"run": Path("x")}, "run=PosixPath('x') (PosixPath): expected a name under runs/, or None"),
        ({"resume": "yes", "run": "x"}, 'resume=yes: expected True, False or "force"'),
        ({"model": 3}, "model=3 (int): expected a directory, a hub id, or a loaded model"),
        ({"args": {"max_steps": 3}}, "args={'max_steps': 3} (dict): expected a GRPOConfig"),
        ({"args": TrainingArguments(report_to="none", use_cpu=True)}, "args=TrainingArgum"),
        ({"train_dataset": None}, "train_dataset: missing; give a datasets.Dataset with a column prompt"),
        ({"reward_timeout": "x"}, "reward_timeout='x' (str): expected a number of seconds; 0: no limit"),
        ({"reward_cage": "x"}, "reward_cage='x' (str): expected a number of processes"),
        ({"tool_cage": "x"}, "tool_cage='x' (str): expected True or False"),
        ({"tool_errors": "x"}, "tool_errors=x: expected one of tell, end, stop"),
        ({"on_row": 3}, "on_row=3 (int): expected a function, or None"),
        ({"callbacks": [3]}, "callbacks: 3: expected a transformers.TrainerCallback"),
        ({"optimizers": (None, 3)}, "optimizers=(None, 3) (tuple): expected a pair (optimizer, scheduler)"),
        ({"optimizers": ()}, "optimizers=() (tuple): expected a pair (optimizer, scheduler)"),
        ({"reward_processing_classes": 3}, "reward_processing_classes=3 (int): expected a tokenizer of the reward model"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config={'bits': 4} (dict): expected none, as quantised weights have no",
        ),
        (
            {"sampler_options": {"servers": "http://x:1"}},
            "sampler_options.servers='http://x:1' (str): expected a list of addresses",
        ),
        ({"optimizers": (FOREIGN, None)}, "optimizers: 1 of its 1 parameters are not of the model that is trained; make it of"),
        ({"reward_funcs": "no/such"}, "reward function 0=no/such: no such directory"),
        (
            {"train_dataset": [{"prompt": "1+1="}]},
            "train dataset: expected a datasets.Dataset, got list; Dataset.from_list",
        ),
    ],
)
def test_an_argument_that_cannot_be_meant_is_one_line(given, line, arithmetic_dir, tmp_path):
    kind = rlinvariant.PPOTrainer if "ppo" in given else rlinvariant.GRPOTrainer
    whole: dict[str, Any] = {"model": str(arithmetic_dir), "reward_funcs": variety, "train_dataset": questions(), **given}
    args = GRPOConfig(str(tmp_path), use_cpu=not CUDA, bf16=False, max_completion_length=8, report_to="none")
    with pytest.raises(ConfigErrors) as error:
        kind(**{"args": args, **whole})
    assert len(error.value.errors) == 1 and error.value.errors[0].startswith(line), error.value


def test_every_argument_is_looked_at():
    assert KINDS.keys() | CHECKED == NAMES | {"ppo"} | {f"sampler_options.{name}" for name in SamplerOptions.__annotations__}


def test_a_directory_of_checkpoints_that_is_a_file_is_refused(arithmetic_dir, tmp_path):
    (tmp_path / "out").write_text("")
    args = GRPOConfig(str(tmp_path / "out"), use_cpu=not CUDA, bf16=False, per_device_train_batch_size=8, report_to="none")
    with pytest.raises(ConfigErrors, match=re.escape("it is a file")):
        rlinvariant.GRPOTrainer(str(arithmetic_dir), variety, args, questions())


def test_an_optimizer_of_the_models_own_parameters_is_none_of_them(arithmetic_dir):
    """A control of the line about an optimizer that would train nothing."""
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
    own = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    assert given_problems({**own, "model": model}) == [] != given_problems({**own, "model": str(arithmetic_dir)})


def test_a_closed_sampler_and_a_checkpoint_that_is_not_there_say_so(arithmetic_dir, exact_engine, tmp_path):
    closed = object.__new__(Sampler)
    closed._end = lambda: None
    closed.close()
    with pytest.raises(UserError, match=r"^the sampler is closed, by its close\(\) or the trainer's"):
        closed.generate([[1]], [0], temperature=1.0, max_tokens=1)
    assert not hasattr(closed, "no_such_name")
    with pytest.raises(UserError, match=r"^resume_from_checkpoint=nix: no such directory; True takes the newest one$"):
        new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer.train(resume_from_checkpoint="nix")
