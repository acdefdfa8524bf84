"""Run every relation and every control on one model, and make the certificate."""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from rlinvariant import runtime
from rlinvariant.config import LoraConfig
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.kernels import choice
from rlinvariant.launch import join, largest, on_main_process, require_same
from rlinvariant.model_source import base_and_adapter
from rlinvariant.models import lora as adapted
from rlinvariant.report.console import Console
from rlinvariant.verification import adapters, certificate, controls, load, relations, speed, table, truncation, turns
from rlinvariant.verification.certificate import Certificate
from rlinvariant.verification.compositions import compositions
from rlinvariant.verification.ladder import ladder
from rlinvariant.verification.options import Options
from rlinvariant.verification.pair import CONTEXT_ON_CPU, FULL_SIZES, SHORT_SIZES, Pair
from rlinvariant.verification.relation import Relation

ADAPTER_CONTROLS = (adapters.without, adapters.merged, adapters.without_padding)
COMPOSITION_SECONDS = 110  # spent on random compositions where `tokens` does not say how many


def verify(
    model: str,
    *,
    tokens: int | None = None,
    short: bool = False,
    random: bool = False,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    eager: bool = False,
    lora: LoraConfig | None = None,
    console: Console | None = None,
) -> Certificate:
    """Find out whether exact mode is exact here, on this model, and return the certificate, exact or not.

    A real vLLM engine draws, the trainer's model scores, and every log-prob that is not the same 32 bits counts. The
    certificate is returned and not kept: the command `rlinvariant verify` also writes it to where exact training looks.

    Args:
        model: directory or hub id of a checkpoint, or directory of a PEFT adapter; with `random`, of a configuration.
        tokens: least number of sampled tokens to compare with the trainer's; None: as many as fit into about two minutes.
        short: run every relation with few tokens, and do not measure speed. Not together with `tokens`.
        random: use random weights.
        seed: decides prompts, draws, batches and random weights.
        dtype: of activations.
        eager: on a GPU, run the engine without CUDA graphs and compilation, to start sooner.
        lora: put LoRA adapters of this shape, with random values, around the model.
        console: prints the table as it grows; None: nothing is printed.

    Raises:
        UserError: the model cannot be loaded, cannot run exactly, or does not fit the memory; or an option makes no sense.
    """
    return verify_with(Options(model, tokens, short, random, seed, dtype, eager, lora), console or Console(main_process=False))


def verify_with(asked: Options, console: Console) -> Certificate:
    """Do what `verify` does, with its arguments in one object. Every process of the engine calls this."""
    asked.require_sense()
    runtime.configure()
    runtime.quiet()
    if asked.tensor_parallel_size > 1:
        join()
        require_same({"attention": choice.chosen()})
    with tempfile.TemporaryDirectory(prefix="rlinvariant-verify-") as scratch:
        try:
            return _verify(asked, scratch, console)
        except (RuntimeError, ValueError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            much = "fp32 masters, a copy in the engine and one of the stock model have to fit"
            raise UserError(f"verify: out of memory ({one_line(error, 160)}): {much}; choose a smaller model") from error


@dataclass
class _Found:
    """Holds the relations and controls so far, each printed as it comes."""

    console: Console
    relations: list[Relation] = field(default_factory=list)
    controls: list[Relation] = field(default_factory=list)

    def add(self, relation: Relation) -> None:
        control = relation.name.startswith(("planted", "stock"))
        (self.controls if control else self.relations).append(relation)
        for line in table.lines(relation, control, self.console.width):
            self.console.print(line, style="" if control or relation.holds else "bold red")

    def __len__(self) -> int:
        return len(self.relations) + len(self.controls)


class _Parts:
    """Holds what is verified, loaded as a run loads it; the stock parts are loaded when a control first asks for them."""

    def __init__(self, asked: Options, scratch: str, console: Console) -> None:
        self.asked = asked
        source, directory = base_and_adapter(asked.model)
        self.processes = asked.tensor_parallel_size
        self.config = load.configuration(source, asked.dtype, self.processes)
        text_config = self.config.get_text_config()
        if asked.lora is not None and (found := adapted.fit_problems("--lora ", asked.lora.peft_config(), self.config)):
            raise ConfigErrors(found)
        full = FULL_SIZES if load.device() == "cuda" else replace(FULL_SIZES, context=CONTEXT_ON_CPU)
        self.sizes = (SHORT_SIZES if asked.short else full).within(text_config.max_position_embeddings)
        with console.stage("loading the model, as the trainer does"):
            make = lambda: load.random_weights(self.config, scratch, asked.seed)  # noqa: E731
            self.directory = source if not asked.random else make() if self.processes == 1 else on_main_process(make)
            self.adapt = adapters.adapt(directory, asked.lora, asked.seed)
            self.trained = load.trained(self.directory, asked.dtype, self.adapt)
        self.ranks = adapted.ranks(self.trained)
        for line in table.head(asked.model, self.trained, asked.random, asked.dtype, asked.seed):
            console.print(line)
        self.engine_options = load.options(self.sizes, asked.eager, self.processes)
        with console.stage("starting the vLLM engine"):
            self.sampler = load.engine(self.directory, True, asked.dtype, self.engine_options, self.sizes, self.ranks)
            self.sampler.sync(adapted.adapters(self.trained))
        self.pair = Pair(self.trained, self.sampler, self.sizes, asked.seed, text_config.vocab_size)
        if self.processes > 1:
            self.pair.agreed = lambda value: on_main_process(lambda: value)

    def by_rows(self) -> Relation:
        """Try an engine that is cut as vLLM cuts it, with our ops: a control."""
        from rlinvariant.sampler.vllm_columns import vllms_plan

        with vllms_plan():
            engine = load.engine(self.directory, True, self.asked.dtype, self.engine_options, self.sizes)
        return controls.cut_by_rows(self.pair, engine)

    @functools.cached_property
    def plain_model(self) -> Any:
        """Return transformers' own model, or PEFT's around it, or in words why there is none."""
        adapt = self.adapt or (lambda model: model)
        return load.or_reason(lambda: adapt(load.stock(self.directory, self.asked.dtype)).eval())

    @functools.cached_property
    def plain_engine(self) -> Any:
        """Return vLLM's own engine, with adapters merged into its weights, or in words why there is none."""
        options = self.engine_options | ({"enforce_eager": True} if self.asked.short else {})

        def make() -> Any:
            engine = load.engine(self.directory, False, self.asked.dtype, options, self.sizes)
            if self.ranks:
                engine.sync(adapted.merged(self.trained))
            return engine

        return load.or_reason(make)


def _verify(asked: Options, scratch: str, console: Console) -> Certificate:
    began, found = time.monotonic(), _Found(console)
    parts = _Parts(asked, scratch, console)
    pair, checks = parts.pair, _checks(parts)
    with console.stage("comparing rows of every op"):
        rows = list(ladder(parts.trained, torch.Generator().manual_seed(asked.seed)))
    console.print(table.TITLES, style="dim")
    for relation in rows:
        found.add(relation)
    with console.stage("verifying", total=asked.tokens or len(rows) + len(checks)) as advance:
        pair.advance = lambda: advance(min(asked.tokens, pair.tokens) if asked.tokens else len(found))
        for check in checks:
            pair.advance()
            found.add(check())
    rates = {}
    if not asked.short and not isinstance(parts.plain_model, str) and not isinstance(parts.plain_engine, str):
        rates = speed.rates(pair, parts.plain_model, parts.plain_engine)
    for line in table.speed(rates):
        console.print(line)
    eager = bool(parts.sampler.llm.llm_engine.model_config.enforce_eager)
    return {
        "exact": _on_all(is_exact(found.relations, found.controls), parts.processes),
        "form": "short" if asked.short else "full",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "model": load.description(asked.model, asked.random, parts.directory, parts.trained, asked.lora),
        "subject": certificate.subject(parts.config, asked.dtype, eager, parts.ranks, parts.processes),
        "environment": certificate.environment(),
        "kernels": load.kernels(),
        "engine": parts.engine_options,
        "sizes": asdict(parts.sizes),
        "seed": asked.seed,
        "tokens": pair.tokens,
        "mismatched": pair.mismatched,
        "relations": [asdict(r) for r in found.relations],
        "controls": [asdict(c) | {"blind": not c.mismatched} for c in found.controls],
        "speed": rates,
    }


def _on_all(exact: bool, processes: int) -> bool:
    """Return whether it is exact on all processes."""
    return exact if processes == 1 else not largest(int(not exact))


def _checks(parts: _Parts) -> list[Callable[[], Relation]]:
    """Return what is compared, in order: `weight_sync` moves the weights, and the controls around it rely on that."""
    asked, pair = parts.asked, parts.pair
    limit = time.monotonic() + (0 if asked.short or asked.tokens else COMPOSITION_SECONDS)
    return [
        *(functools.partial(check, pair) for check in relations.BATCH_RELATIONS),
        lambda: relations.contexts(pair),
        *([lambda: relations.on_all_processes(pair)] if parts.processes > 1 else []),
        lambda: turns.turns(pair),
        lambda: truncation.truncated(pair),
        lambda: truncation.rows_alone(pair),
        lambda: compositions(pair, lambda: pair.tokens < (asked.tokens or 0) or time.monotonic() < limit),
        lambda: controls.one_ulp(pair, getattr(torch, asked.dtype)),
        lambda: turns.another_token(pair),
        lambda: truncation.all_tokens(pair),
        lambda: truncation.vllms_rows(pair),
        *([parts.by_rows] if parts.processes > 1 else []),
        lambda: controls.stock_attention(pair),
        lambda: controls.stock_trainer(pair, parts.plain_model),
        *([functools.partial(check, pair) for check in ADAPTER_CONTROLS] if parts.ranks else []),
        lambda: relations.weight_sync(pair),
        lambda: controls.stale_weights(pair),
        lambda: controls.stock_both(pair, parts.plain_model, parts.plain_engine),
    ]


def is_exact(relations: Sequence[Relation], controls: Sequence[Relation]) -> bool:
    """Return whether every relation holds, by a comparison that sees every planted fault; there must be some of both."""
    planted = [c for c in controls if c.name.startswith("planted")]
    return bool(relations and planted) and all(r.holds for r in relations) and all(c.mismatched for c in planted)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is torch's, Python's or vLLM's way of saying that memory is short."""
    words = ("out of memory", "can't allocate memory", "No available memory", "available KV cache memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)
