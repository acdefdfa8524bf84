"""The parts that run in the processes of `vllm serve` to make it exact; written for vLLM 0.26 (CUDA) and 0.32 (CPU).

The server's engine is in a process of its own, which gets strings and plain values alone. So each part goes in by a name
that vLLM has an option for: `Worker` puts our sampler into the engine and checks the model there, `Requests` refuses a request
that could not be exact, in the front end, and `Proof` asks the engine what it runs before the server says that it is ready.
Who may ask at all is in vllm_guard.py.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessor

from rlinvariant import deadline, errors, runtime, trainer_token
from rlinvariant.errors import NOT_EXACT, ConfigErrors, Stopped, UserError, one_line
from rlinvariant.kernels import choice
from rlinvariant.launch import end_with_parent
from rlinvariant.model_source import base_and_adapter, load_tokenizer, tokenizer_of
from rlinvariant.models import adapter_files, audit_config, lora
from rlinvariant.models.limits import attention_of
from rlinvariant.rollout import RANGES
from rlinvariant.sampler import adapters, plugin, vllm_guard
from rlinvariant.sampler.names import ARCHITECTURE, NOT_ACTIVE, QUANTIZATION
from rlinvariant.sampler.refusals import load_config, refuse
from rlinvariant.sampler.vllm_for_trainers import ROOM_KEY, ForTrainers
from rlinvariant.sampler.vllm_trainers import Trainers
from rlinvariant.text import say
from rlinvariant.types import JsonObject, Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_Worker: Any
if current_platform.is_cuda():
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker

ADAPTER_KEY = "rlinvariant_adapter"  # of vLLM's additional_config: the directory of a PEFT adapter
ATTENTION_KEY = "rlinvariant_attention"  # of the same: the front end's choice, which the engine's process must have too
REMOVE = "remove it, or use vllm serve"
SET_HERE: dict[str, Any] = {  # engine options that are set here; vLLM reads each for
    "quantization": QUANTIZATION,  # who owns the linear layers and the lm_head
    "hf_overrides": {"architectures": [ARCHITECTURE]},  # which model class it builds, in place of config.json's
    "logprobs_mode": "processed_logprobs",  # which log-probs it reports: after the temperature
    "generation_config": "vllm",  # where a request's defaults come from: vLLM, not the checkpoint's generation_config.json
    "worker_cls": f"{__name__}.Worker",  # what runs in the engine's process
    "logits_processors": [f"{__name__}:Requests"],  # whom the front end asks about each request before it is queued
}
BITS_UNCHANGED_BY = {  # engine options that change no bit of a completion; any other must keep its default
    "block_size",
    "cudagraph_capture_sizes",
    "disable_log_stats",
    "download_dir",
    "dtype",
    "enable_chunked_prefill",
    "enable_log_requests",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "hf_token",
    "kv_cache_memory_bytes",
    "long_prefill_token_threshold",
    "max_cudagraph_capture_size",
    "max_logprobs",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_num_seqs",
    "model",
    "num_gpu_blocks_override",
    "prefix_caching_hash_algo",
    "reasoning_parser",
    "reasoning_parser_plugin",
    "revision",
    "scheduling_policy",
    "seed",
    "served_model_name",
    "shutdown_timeout",
    "stream_interval",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "use_tqdm_on_load",
}
UNTOUCHED_FRONT_END = ("headless", "grpc", "grpc_port", "api_server_count", "lora_modules")  # its options that must be default
SHAPELESS_SETTINGS = {  # fields of SamplingParams that leave the distribution as it is; others must be neutral, or in RANGES
    "detokenize",
    "flat_logprobs",
    "ignore_eos",
    "include_stop_str_in_output",
    "logprobs",
    "max_tokens",
    "n",
    "output_kind",
    "output_text_buffer_length",
    "prompt_logprobs",
    "seed",
    "skip_clone",
    "skip_reading_prefix_cache",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "stream_interval",
    "temperature",
}


Subject: TypeAlias = Callable[["PreTrainedConfig", str, bool], JsonObject]
"""Returns what decides a server's bits, as a certificate has it: of a configuration, a dtype, and whether it runs eagerly."""
Room: TypeAlias = Callable[[Sequence[str], "PreTrainedConfig"], dict[str, int]]
"""Returns the ranks that settings of `--lora` mean, by the names of projections, for a model's configuration."""


def serve(argv: Sequence[str], subject: Subject | None = None, room: Room | None = None) -> int:
    """Run `vllm serve` with these arguments and the ops on; return the exit code of one whose engine is not exact, or died.

    Args:
        argv: the command line's.
        subject, room: say to trainers what decides the server's bits, and read `--lora`.

    Raises:
        ConfigErrors: what could not be exact, one line each, before any weights are loaded.
        UserError: no model is named, or the plugin is not installed.
        Stopped: a signal has ended it, in its start or later.
    """
    runtime.configure()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # it removes what vLLM leaves at its end
    command, args = prepared(argv, subject, room)
    plugin.load()
    plugin.register_class()
    command.validate(args)
    try:
        command.cmd(args)
    except KeyboardInterrupt as stop:  # in the start, where vLLM makes it of a SIGTERM, too, and gives it a text then
        raise Stopped(signal.SIGTERM if str(stop) else errors.stop_code(stop) - 128) from stop
    except RuntimeError as error:
        raise UserError(f"vLLM: {one_line(error, 200)} (the cause is in the log above)") from error
    except SystemExit:  # uvicorn's, of an application that did not start
        if not _not_exact:
            raise
    if _ended_by:
        raise Stopped(_ended_by[0])
    why = _not_exact[0] if _not_exact else "vLLM's engine has ended (the cause is in the log above)"
    say(f"error: {why}", error=True)
    return NOT_EXACT


def prepared(argv: Sequence[str], subject: Subject | None = None, room: Room | None = None) -> tuple[Untyped, Untyped]:
    """Return vLLM's command, and its namespace of these arguments with what an exact server needs. Raises as `serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command, parser = ServeSubcommand(), FlexibleArgumentParser(prog="rlinvariant")
    own = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    own.add_argument("--allowed-hosts", nargs="+", default=[], help="names by which clients call this server, as Host says")
    own.add_argument("--trainer-token-file", help="serve trainers that show the token in this file, and nobody else")
    own.add_argument("--lora", nargs="+", metavar="KEY=VALUE", help="make room for a trainer's adapters: its lora.*, as r=16")
    args: Any = parser.parse_args(["serve", *argv])
    default: Any = parser.parse_args(["serve"])
    prepare(args, default, subject, room)
    return command, args


def prepare(args: Untyped, default: Untyped, subject: Subject | None = None, room: Room | None = None) -> None:
    """Set in `args`, parsed from a command line, what an exact server needs.

    Args:
        args: vLLM's namespace of the user's command line; changed in place.
        default: vLLM's namespace of an empty command line.
        subject, room: as for `serve`.

    Raises:
        ConfigErrors, UserError: see `serve`.
    """
    args.model = args.model_tag or (args.model if args.model != default.model else None)
    if not args.model:
        raise UserError("MODEL: missing; write rlinvariant serve MODEL, a Hugging Face directory or hub id")
    named, (args.model, adapter) = args.model, base_and_adapter(args.model)
    args.model_tag = args.model
    given = {k: v for k, v in vars(args).items() if v != getattr(default, k)}
    args.host = args.host or "127.0.0.1"
    args.allowed_origins = given.get("allowed_origins", [])  # vLLM 0.26 lets every page ask
    args.trainer_token = None
    if (file := args.trainer_token_file) is not None:
        args.trainer_token = trainer_token.read(file, "--trainer-token-file ")
    problems = _option_problems(given, default) + vllm_guard.problems(args, given) + _trainer_problems(args, adapter)
    args.dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    if args.dtype not in ("bfloat16", "float32"):
        problems.append(f"--dtype {args.dtype}: expected bfloat16 or float32; {REMOVE}")
    if problems:
        raise ConfigErrors(problems)
    found = None if adapter is None else adapter_files.read(adapter)  # faults are said here, not in the engine's process
    args.additional_config = {ATTENTION_KEY: choice.chosen()}
    if adapter is not None:
        args.additional_config[ADAPTER_KEY] = os.path.abspath(adapter)
        args.served_model_name = args.served_model_name or [named]
        args.tokenizer = args.tokenizer or tokenizer_of(args.model, adapter)
    longest = args.max_model_len if isinstance(args.max_model_len, int) and args.max_model_len > 0 else None
    positions = refuse({}, args.model, args.dtype, otherwise="use vllm serve")
    elsewhere = ("tokenizer_mode", "tokenizer_revision", "revision", "hf_token")  # by which vLLM reads other files
    if file is None and all(getattr(args, name) == getattr(default, name) for name in elsewhere):  # a trainer brings tokens
        key, where = ("MODEL", args.model) if args.tokenizer is None else ("--tokenizer", args.tokenizer)
        try:
            load_tokenizer(where, load_config(args.model), key)
        except UserError as error:
            raise UserError(f"{error}, or name another directory that has one: --tokenizer DIR") from error
    if found is not None:
        found.require_fit_to(args.model)
    if longest is not None and longest > positions:
        raise ConfigErrors([f"--max-model-len {longest}: expected at most {positions}, the model's positions; lower it"])
    args.max_model_len = args.max_model_len or positions  # vLLM's own default may be beyond the rotary table
    for name, value in SET_HERE.items():
        setattr(args, name, value)
    added = [Proof, *([] if file is None else [Trainers]), vllm_guard.Guard]
    args.middleware = [*args.middleware, *(f"{x.__module__}.{x.__name__}" for x in added)]  # the last is the outermost
    if not torch.cuda.is_available():  # see sampler/engine.py
        args.enforce_eager, args.async_scheduling = True, False
        if {"kv_cache_memory_bytes", "gpu_memory_utilization"}.isdisjoint(given):
            args.kv_cache_memory_bytes = 2**30
    elif "kv_cache_memory_bytes" in given and "gpu_memory_utilization" not in given:
        args.gpu_memory_utilization = 0.01  # the share that must be free at start: a trainer may have taken the default's
    if file is not None:
        args.disable_log_stats = True  # they are counted for each token of each request, and nobody could ask for them
        about = None if subject is None else subject(load_config(args.model), args.dtype, bool(args.enforce_eager))
        if args.lora and room is not None:
            args.additional_config |= {ROOM_KEY: room(args.lora, load_config(args.model))}
        args.trainer_facts = {"model": named, "subject": about, "room": ROOM_KEY in args.additional_config}


def _trainer_problems(args: Untyped, adapter: str | None) -> list[str]:
    """Return a line for each reason why a server of this model cannot be a trainer's; none where it is to be none."""
    found, file = [], args.trainer_token_file
    if file is None and args.lora:
        fix = "add it, or remove --lora and name a PEFT adapter's directory as MODEL"
        found.append(f"--lora {' '.join(args.lora)}: expected --trainer-token-file, of the trainer who brings adapters; {fix}")
    if file is not None and adapter is not None:
        found.append(f"MODEL={adapter}: expected a whole model for trainers, who bring all weights; name its base")
    return found


def _option_problems(given: dict[str, Any], default: Any) -> list[str]:
    """Return one line for each of the options `given` that is set here, or is not known to leave the bits as they are."""
    from dataclasses import fields

    from vllm import AsyncEngineArgs

    engine, problems = {field.name for field in fields(AsyncEngineArgs)}, []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')} {value}"
        if name in SET_HERE:
            problems.append(f"{option}: rlinvariant sets it itself; {REMOVE}")
        elif (name in engine and name not in BITS_UNCHANGED_BY) or name in UNTOUCHED_FRONT_END:
            problems.append(f"{option}: expected {getattr(default, name)}: not known to leave the bits as they are; {REMOVE}")
    return problems


class Requests(LogitsProcessor):
    """Refuses, with status 400, a request whose tokens would not be drawn from the model's distribution, whole or truncated.

    Before a request is queued, vLLM asks each logits processor whether it takes the request. `Requests` is there to be asked
    and does nothing else: `Worker` takes it out of the engine.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        neutral, allowed = SamplingParams(), (*SHAPELESS_SETTINGS, *RANGES)
        refused = []
        for name in SamplingParams.__struct_fields__:
            value = getattr(sampling_params, name)
            same = value in (getattr(neutral, name), None, [], {})
            if not (same or name in allowed or name.startswith("_")):
                refused.append(f"{name}={value}")
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: this server draws from the model's own distribution, exactly; remove it from the "
                "request, or use vllm serve"
            )

    def __init__(self, vllm_config: Untyped, device: torch.device, is_pin_memory: bool) -> None:
        raise UserError(f"this logits processor is for the front end alone; {NOT_ACTIVE}")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        raise NotImplementedError

    def update_state(self, batch_update: Untyped) -> None:
        raise NotImplementedError


def _end_with_front_end() -> None:
    """Let the engine's process end when the one that started it has: where that is killed, nobody else would end this one.

    It would keep the model and the memory for keys and values, and nobody could ask it for anything.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and end_with_parent(signal.SIGKILL) and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)  # it is gone already


class Worker(_Worker, ForTrainers):
    """Runs vLLM's worker with our sampler in it. It does not start unless the model passes the trainer's checks."""

    def __init__(self, vllm_config: Untyped, *args: Untyped, **kwargs: Untyped) -> None:
        _end_with_front_end()
        plugin.require_own_registration()
        vllm_config.model_config.logits_processors = None  # in the engine it would cost a copy of every token drawn
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Untyped, **kwargs: Untyped) -> None:
        config = self.model_config.hf_config
        if (own := choice.chosen()) != (asked := self.vllm_config.additional_config.get(ATTENTION_KEY)):
            what = f"attention={own} in the engine's process, attention={asked} in the one that started it"
            raise UserError(f"{what}; give both the same {choice.VARIABLE}")
        self._audited = audit_config(config, self.model_config.dtype, self.device)
        directory = self.vllm_config.additional_config.get(ADAPTER_KEY)
        adapter = None if directory is None else adapter_files.read(directory)
        room = self.vllm_config.additional_config.get(ROOM_KEY, {})
        with adapters.expecting(room if adapter is None else adapter.ranks):
            super().load_model(*args, **kwargs)
        if adapter is not None:
            with torch.no_grad():
                self.model_runner.get_model().load_weights(iter(adapter.weights))
            self._audited += f" with {lora.in_words(adapter.ranks)}"

    def compile_or_warm_up_model(self) -> Untyped:
        from rlinvariant.sampler.vllm_model import install

        times = super().compile_or_warm_up_model()
        install(self.model_runner)
        return times

    def prove(self) -> str:
        """Return what this engine runs, in words. Raises UserError where it is not all ours."""
        from rlinvariant.sampler.vllm_model import InvariantSampler, require_installed

        attentions, products = require_installed(self.model_runner)
        if type(self.model_runner.sampler) is not InvariantSampler:
            raise UserError(f"the engine samples by {type(self.model_runner.sampler).__name__}; {NOT_ACTIVE}")
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        attentions = f"{attentions} attention layers"
        attentions += f" ({attention_of(self.model_config.hf_config)})" if self.device.type == "cuda" else ""
        return (
            f"engine process {os.getpid()}: {self._audited} in {dtype}; {attentions}, {products} products and "
            "the sampler are rlinvariant.ops; the trainer's audit found nothing outside them"
        )


_ended_by: list[int] = []  # signals that came while the server ran, of which vLLM says none when it has ended
_not_exact: list[str] = []  # why the engine has not proven itself: then the server does not start


def _note_signals() -> None:
    """Note which signal ends the server from now on; vLLM's handlers, which are there by now, do what they did."""
    before: dict[int, Untyped] = {number: signal.getsignal(number) for number in deadline.WITHIN_S}

    def note(number: int, frame: FrameType | None) -> None:
        _ended_by.append(number)
        if number not in (signal.SIGINT, signal.SIGTERM):  # which alone vLLM knows
            os.kill(os.getpid(), signal.SIGTERM)
        elif callable(of_vllm := before[number]):
            of_vllm(number, frame)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as SIGHUP under nohup
            signal.signal(number, note)


class Proof:
    """Holds back "startup complete", as ASGI middleware, until the engine has said that it is exact, and prints that."""

    def __init__(self, app: Untyped) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def checked(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    (proof,) = await scope["app"].state.engine_client.collective_rpc("prove")
                    say(f"exact: {proof}")
                except Exception as error:
                    _not_exact.append(f"the engine is not exact: {one_line(error, 400)}")
                    message = {"type": "lifespan.startup.failed", "message": "the engine is not exact"}
            await send(message)

        if scope["type"] == "lifespan":
            _note_signals()
        await self.app(scope, receive, checked if scope["type"] == "lifespan" else send)
