"""`train.py`'s command, many times in one process, since most of a start is importing: each mode, a resumed run, each mistake.

    accelerate launch many_runs.py MODEL ARGUMENTS-OF-A-SMALL-RUN    or as a fork of `tests.forks`

Prints, as JSON, the exit code and what went to stderr and stdout, by name.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RECIPE = f"recipe={Path(__file__).with_name('tiny_recipe.py')}"
CONSTANT = "trainer.lr_scheduler_type=constant"  # so that more steps are the same run
CANARY = "c4n4ry" * 7  # 42 characters, as long as a key of W&B at least
RESULTS: dict[str, dict[str, Any]] = {}


def attempt(name: str, *arguments: str, command: str = "train") -> None:
    from rlinvariant import cli

    if command == "train" and not any(argument.startswith("wandb.mode=") for argument in arguments):
        arguments = ("wandb.mode=disabled", *arguments)
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(output):
        try:
            code: Any = cli.main([command, *arguments], script="train.py" if command == "train" else "")
        except BaseException:
            code = "traceback"
            traceback.print_exc()
    RESULTS[name] = {"code": code, "error": error.getvalue(), "output": output.getvalue()}


def mistake(name: str, *arguments: str) -> None:
    attempt(name, RECIPE, f"run={name.replace(' ', '_').replace(',', '')}", *arguments)


def damaged(model: str, name: str, **changes: Any) -> str:
    """A copy of the checkpoint with another config.json, or without readable weights."""
    shutil.copytree(model, name)
    config = Path(name, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return name


def random_model(model: str, name: str, config: Any) -> str:
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, name, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    return name


def main(model: str, small: list[str]) -> None:
    for invariance in ("off", "sampler", "trainer"):
        attempt(invariance, *small, f"invariance={invariance}", f"run={invariance}")
    with counting() as RESULTS["calls"]:
        attempt("interrupted", RECIPE, f"model={model}", "run=resumed", "trainer.save_steps=2", CONSTANT)
    attempt("resumed", RECIPE, f"model={model}", "run=resumed", "resume=true", "steps=4", CONSTANT)
    attempt("replayed", "runs/resumed", "--step", "3", command="replay")
    for fault in ("no prompt", "reward raises"):
        mistake(fault, f"model={model}", f"data.fault={fault}")
    secrets(model)
    unreadable(model)
    unsupported(model)
    outcomes(model)
    no_plugin(model)
    no_compiler(model)
    print("RESULTS", json.dumps(RESULTS))


@contextlib.contextmanager
def counting() -> Iterator[dict[str, list[str]]]:
    """Wrap what reads a model's configuration and what checks, and yield who called each: the nearest module of ours or vLLM's.

    `make_invariant` looks for itself whether it can patch a model, whoever calls it, so its calls are not those of a start.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from rlinvariant import conflicts, models, support
    from rlinvariant.models import patch
    from rlinvariant.sampler import refusals
    from rlinvariant.trainer import preflight

    calls: dict[str, list[str]] = {}

    def wrapped(function: Any) -> Any:
        name, found = function.__name__, calls.setdefault(function.__qualname__, [])

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            names = (frame.f_globals["__name__"] for frame, _ in traceback.walk_stack(sys._getframe(1)))
            found.append(next((n for n in names if n.startswith(("rlinvariant.", "vllm."))), name))
            return function(*args, **kwargs)

        return wrapper

    functions = [
        conflicts.conflicts,
        support.device_problems,
        models.unsupported,
        refusals.engine_problems,
        preflight.check_start,
        preflight.check_data,
    ]
    ours = [m for n, m in sys.modules.items() if n.startswith("rlinvariant.") and m is not patch]
    with contextlib.ExitStack() as stack:
        for function in functions:
            replacement = wrapped(function)
            for module in ours:
                if vars(module).get(function.__name__) is function:
                    stack.enter_context(mock.patch.object(module, function.__name__, replacement))
        for kind in (AutoConfig, AutoTokenizer, GenerationConfig):
            stack.enter_context(mock.patch.object(kind, "from_pretrained", wrapped(kind.from_pretrained)))
        yield calls


def secrets(model: str) -> None:
    """Log to W&B, with a secret wherever a user may have one: variables of the environment, and settings."""
    given = [RECIPE, f"model={model}", "run=secrets", "steps=1", "wandb.mode=offline", "wandb.tags=seen-by-wandb"]
    given += [f"data.api_key={CANARY}", f"data.source=https://me:{CANARY}@example.org/rows", "trainer.save_steps=1"]
    names = ("WANDB_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
    held = dict.fromkeys(names, CANARY) | {"DATABASE_URL": f"postgres://me:{CANARY}@example.org"}
    with mock.patch.dict(os.environ, held), mock.patch.object(sys, "argv", ["train.py", *given]):
        attempt("secrets", *given)


def outcomes(model: str) -> None:
    """Ways to end in the middle: a log-prob that differs, ctrl-C, a bug."""
    from rlinvariant.trainer import InvariantGRPOTrainer

    generate = InvariantGRPOTrainer._generate_single_turn

    def differing(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, logprobs = generate(self, *args, **kwargs)
        logprobs[2][1] *= 1 + 2**-23 * (self.state.global_step == 1)
        return ids, logprobs

    with mock.patch.object(InvariantGRPOTrainer, "_generate_single_turn", differing):
        mistake("not exact", f"model={model}")
    mistake("ctrl-C", f"model={model}", "data.fault=ctrl-C")
    with mock.patch.object(InvariantGRPOTrainer, "_seeds", side_effect=IndexError("a bug")):
        mistake("bug", f"model={model}")


def unreadable(model: str) -> None:
    path = damaged(model, "no_weights")
    Path(path, "model.safetensors").unlink()
    mistake("no weights", f"model={path}")
    path = damaged(model, "torn")
    Path(path, "model.safetensors").write_bytes(Path(model, "model.safetensors").read_bytes()[:5000])
    mistake("torn weights", f"model={path}")
    mistake("unknown architecture", f"model={damaged(model, 'unknown', model_type='qwen99')}")


def unsupported(model: str) -> None:
    from transformers import GPT2Config, MixtralConfig, Qwen3Config

    sizes = {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    config = GPT2Config(vocab_size=99, n_embd=128, n_layer=1, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2)
    path = random_model(model, "gpt2", config)
    mistake("GPT-2", f"model={path}")
    mistake("GPT-2, sampler", f"model={path}", "invariance=sampler")
    mistake("head of 16", f"model={random_model(model, 'small_heads', Qwen3Config(**sizes, head_dim=16))}")
    noise = {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.0}
    experts = MixtralConfig(**sizes, head_dim=64, intermediate_size=64, num_local_experts=2, **noise)
    mistake("experts", f"model={random_model(model, 'experts', experts)}")


def no_plugin(model: str) -> None:
    """vLLM as it is where rlinvariant's entry point is not found: it has loaded its plugins, and ours is not among them."""
    from vllm.model_executor.layers import quantization

    methods = [m for m in quantization.QUANTIZATION_METHODS if m != "rlinvariant"]
    with mock.patch.object(quantization, "QUANTIZATION_METHODS", methods):
        mistake("no plugin", f"model={model}")


def no_compiler(model: str) -> None:
    from rlinvariant.kernels import cpu

    cpu.library.cache_clear()
    with mock.patch.dict(os.environ, CC="no-such-compiler", RLINVARIANT_CACHE=os.path.abspath("kernels")):
        mistake("no compiler", f"model={model}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
