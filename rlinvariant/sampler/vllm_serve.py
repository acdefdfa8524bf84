"""What runs in the processes of `vllm serve` to make it exact. As vllm_model.py, written for vLLM 0.26 (CUDA) and 0.32 (CPU).

The server's engine is in a process of its own, which gets strings and plain values alone. So each part goes in by a name
that vLLM has an option for: `Worker` puts our sampler into the engine and checks the model there, `Requests` refuses a request
that could not be exact, in the front end, and `Proof` asks the engine what it runs before the server says that it is ready.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessor

from rlinvariant import runtime
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.models import make_invariant, require_exact, two_layers
from rlinvariant.sampler.engine import refuse
from rlinvariant.sampler.names import ARCHITECTURE, NOT_ACTIVE, QUANTIZATION

_Worker: Any
if current_platform.is_cuda():
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker

REMOVE = "remove it, or use vllm serve"
OURS = {  # engine options that are set here
    "quantization": QUANTIZATION, "hf_overrides": {"architectures": [ARCHITECTURE]}, "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm", "worker_cls": f"{__name__}.Worker", "logits_processors": [f"{__name__}:Requests"],
}  # fmt: skip
HARMLESS = {  # engine options that change no bit of a completion; any other must keep its default
    "model", "tokenizer", "tokenizer_mode", "tokenizer_revision", "revision", "hf_token", "download_dir", "served_model_name",
    "dtype", "seed", "max_model_len", "max_logprobs", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
    "max_num_queued_tokens", "long_prefill_token_threshold", "enable_chunked_prefill", "scheduling_policy", "stream_interval",
    "block_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "enable_prefix_caching",
    "prefix_caching_hash_algo", "enforce_eager", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "use_tqdm_on_load",
    "disable_log_stats", "enable_log_requests", "reasoning_parser", "reasoning_parser_plugin", "shutdown_timeout",
}  # fmt: skip
ALONE = ("headless", "grpc", "grpc_port", "api_server_count", "lora_modules")  # options of the front end that must be default
SAMPLING = {  # fields of SamplingParams that leave the distribution as it is; any other must be neutral
    "n", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs", "prompt_logprobs",
    "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache",
}  # fmt: skip


def serve(argv: Sequence[str]) -> None:
    """Run `vllm serve` with these arguments and the ops on, until it is stopped.

    Raises:
        ConfigErrors: what could not be exact, one line each, before any weights are loaded.
        UserError: no model is named, or the plugin is not installed.
    """
    runtime.configure()
    from vllm import ModelRegistry
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command, parser = ServeSubcommand(), FlexibleArgumentParser(prog="rlinvariant")
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args: Any = parser.parse_args(["serve", *argv])
    default: Any = parser.parse_args(["serve"])
    prepare(args, default)
    load_general_plugins()
    if QUANTIZATION not in QUANTIZATION_METHODS:
        raise UserError(NOT_ACTIVE)
    from rlinvariant.sampler.vllm_model import InvariantForCausalLM

    ModelRegistry.register_model(ARCHITECTURE, InvariantForCausalLM)  # the class itself: see sampler/engine.py
    command.validate(args)
    try:
        command.cmd(args)
    except RuntimeError as error:
        raise UserError(f"vLLM: {one_line(error, 200)} (the cause is in the log above)") from error


def prepare(args: Any, default: Any) -> None:
    """Set in `args`, parsed from a command line, what an exact server needs; `default`: parsed from none. Raises as `serve`."""
    from dataclasses import fields

    from vllm import AsyncEngineArgs

    args.model = args.model_tag or (args.model if args.model != default.model else None)
    if not args.model:
        raise UserError("MODEL: missing; write rlinvariant serve MODEL, a Hugging Face directory or hub id")
    given = {k: v for k, v in vars(args).items() if v != getattr(default, k)}
    engine = {field.name for field in fields(AsyncEngineArgs)}
    problems = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')} {value}"
        if name in OURS:
            problems.append(f"{option}: rlinvariant sets it itself; {REMOVE}")
        elif (name in engine and name not in HARMLESS) or name in ALONE:
            problems.append(f"{option}: expected {getattr(default, name)}: not known to leave the bits as they are; {REMOVE}")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        problems.append(f"VLLM_USE_RUST_FRONTEND={os.environ['VLLM_USE_RUST_FRONTEND']}: expected unset: it checks no request")
    args.dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    if args.dtype not in ("bfloat16", "float32"):
        problems.append(f"--dtype {args.dtype}: expected bfloat16 or float32; {REMOVE}")
    if problems:
        raise ConfigErrors(problems)
    longest = args.max_model_len if isinstance(args.max_model_len, int) and args.max_model_len > 0 else None
    positions = refuse({}, args.model, args.dtype, otherwise="use vllm serve")
    if longest is not None and longest > positions:
        raise ConfigErrors([f"--max-model-len {longest}: expected at most {positions}, the model's positions; lower it"])
    args.max_model_len = args.max_model_len or positions  # vLLM's own default may be beyond the rotary table
    for name, value in OURS.items():
        setattr(args, name, value)
    args.middleware = [*args.middleware, f"{__name__}.Proof"]
    args.host = args.host or "127.0.0.1"
    if not torch.cuda.is_available():  # as sampler/engine.py has it
        args.enforce_eager, args.async_scheduling = True, False
        if {"kv_cache_memory_bytes", "gpu_memory_utilization"}.isdisjoint(given):
            args.kv_cache_memory_bytes = 2**30


class Requests(LogitsProcessor):
    """Refuses, with status 400, a request whose tokens would not be drawn from the model's whole distribution.

    vLLM asks each logits processor whether it can do a request before it is queued, and this one is there to be asked: `Worker`
    takes it out of the engine.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        neutral = SamplingParams()
        refused = []
        for name in SamplingParams.__struct_fields__:
            value = getattr(sampling_params, name)
            same = value in (getattr(neutral, name), None, [], {}) or (name == "top_k" and value == -1)
            if not (same or name in SAMPLING or name.startswith("_")):
                refused.append(f"{name}={value}")
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: this server draws from the model's whole distribution, exactly; remove it from the "
                "request, or use vllm serve"
            )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        raise UserError(f"this logits processor is for the front end alone; {NOT_ACTIVE}")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        raise NotImplementedError

    def update_state(self, batch_update: Any) -> None:
        raise NotImplementedError


class Worker(_Worker):
    """vLLM's worker with our sampler in it. It does not start unless the model passes the trainer's checks."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        vllm_config.model_config.logits_processors = None  # in the engine it would cost a copy of every token drawn
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        config = self.model_config.hf_config
        self._audited = audit_config(config, self.model_config.dtype, self.device)
        super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        from rlinvariant.sampler.vllm_model import install

        times = super().compile_or_warm_up_model()
        install(self.model_runner)
        return times

    def prove(self) -> str:
        """What this engine runs, in words. Raises UserError where it is not all ours."""
        from rlinvariant.sampler.vllm_model import InvariantSampler, require_installed

        attentions, products = require_installed(self.model_runner)
        if type(self.model_runner.sampler) is not InvariantSampler:
            raise UserError(f"the engine samples by {type(self.model_runner.sampler).__name__}; {NOT_ACTIVE}")
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        return (
            f"engine process {os.getpid()}: {self._audited} in {dtype}; {attentions} attention layers, {products} products and "
            "the sampler are rlinvariant.ops; the trainer's audit found nothing outside them"
        )


def audit_config(config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Do the trainer's checks on the first two layers of a model of this configuration, with random weights; give its class."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        model = AutoModelForCausalLM.from_config(two_layers(config.get_text_config()), dtype=dtype)
    name = type(model).__name__
    require_exact(make_invariant(model, dtype))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return name


class Proof:
    """ASGI middleware: holds back "startup complete" until the engine has said that it is exact, and prints that."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def checked(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    (proof,) = await scope["app"].state.engine_client.collective_rpc("prove")
                    print(f"exact: {proof}", flush=True)
                except Exception as error:
                    message = {"type": "lifespan.startup.failed", "message": f"error: the engine is not exact: {error}"}
            await send(message)

        await self.app(scope, receive, checked if scope["type"] == "lifespan" else send)
