"""`rlinvariant replay RUN --step K`: a recorded step once more, from the weights it began with. Are the bits the same?"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import runtime
from rlinvariant.arguments import at_least, written
from rlinvariant.conflicts import SIDES
from rlinvariant.errors import INTERRUPTED, NOT_EXACT, OK, ConfigErrors, UserError
from rlinvariant.files import RUNS
from rlinvariant.kernels import choice
from rlinvariant.model_source import base_and_adapter, source_problems
from rlinvariant.report import rollouts
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir
from rlinvariant.report.search import locate
from rlinvariant.text import plural
from rlinvariant.types import JsonObject, JsonRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlinvariant.sampler.engine import Sampler

if TYPE_CHECKING:  # these import torch, transformers and vLLM, for which a mistake need not wait
    from rlinvariant.rollout import Completion, Rollout
    from rlinvariant.verification.pair import Pair
    from rlinvariant.verification.relation import Relation

DESCRIPTION = """Replays a step that the run has recorded: step 1, and each step after a checkpoint. Loads the weights that it
began with, which must have the recorded hash; draws the same prompts with the same seeds; scores the recorded completions with
the trainer's model; counts the 32-bit log-probs that are not the recorded ones. Exit code 0: none; 1: some, which is a fault of
invariance=exact alone; 2: cannot run."""
EXAMPLE = "rlinvariant replay runs/arithmetic --step 1"
ENGINE_OPTIONS = {"max_num_seqs": int, "enable_prefix_caching": bool, "enforce_eager": bool, "max_num_batched_tokens": int}
"""Options of vLLM that a run can record. vLLM has others that name code to be run, and a recording is data."""
LONE_REQUESTS = 8  # requests that are drawn with no other in the engine
FORWARD_TOKENS = 8192  # most tokens in one forward of the trainer's model


def _is_sampler(found: Any) -> bool:
    """Tell whether a value is what a run records of its engine."""
    if not isinstance(found, dict) or not found.keys() <= {"max_model_len", "kv_cache_gib", "options"}:
        return False
    options = found.get("options", {})
    return (
        isinstance(found.get("max_model_len"), int | None)
        and isinstance(found.get("kv_cache_gib"), int | float | None)
        and isinstance(options, dict)
        and all(type(value) is ENGINE_OPTIONS.get(key) for key, value in options.items())
    )


def _is_subject(found: Any) -> bool:
    """Tell whether a value is a machine as `certificate.subject` describes one."""
    keys = {"device", "threads", "packages", "isa", "sources"}
    if not (isinstance(found, dict) and keys <= found.keys() and isinstance(found["packages"], dict)):
        return False
    return found.get("attention", choice.AUTO) in choice.ATTENTIONS


DESCRIPTION_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    "weights": lambda x: isinstance(x, str) and x != "" and not x.startswith("-"),
    "invariance": lambda x: isinstance(x, str) and x in SIDES,
    "dtype": lambda x: x in ("bfloat16", "float32"),
    "sampler": _is_sampler,
    "subject": _is_subject,
}
"""The name of each thing that a recording says of its run -> whether a value can be that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `replay`."""
    parser.add_argument("run", metavar="RUN", help=f"the run's directory, {RUNS}/NAME, or its name")
    parser.add_argument("--step", type=at_least(1), metavar="K", help="which step, as metrics.jsonl counts them")
    parser.add_argument("--weights", type=written, metavar="DIR", help="where the weights are now, if they were moved")


def run(options: argparse.Namespace) -> int:
    """Replay the step, print the table, and return the exit code.

    Raises:
        UserError: what is missing or damaged, in one line.
    """
    began, step, console = time.monotonic(), options.step, Console()
    rollout, about, weights = recorded(locate(options.run), step, options.weights)
    if problems := source_problems("weights", weights, adapters=True):
        raise ConfigErrors(problems)
    runtime.configure()
    runtime.quiet()
    with console.stage("loading transformers and vLLM"):
        from rlinvariant.sampler.engine import Sampler
        from rlinvariant.verification import certificate, table
    then, dtype = about["subject"], about["dtype"]
    compute_as(then)
    tokens = sum(len(c.token_ids) for c in rollout.completions)
    batches = f" in {plural(len(rollout.batches), 'batch', 'batches')}" if len(rollout.batches) > 1 else ""
    drawn = f"{plural(len(rollout.completions), 'completion')}{batches}, {plural(tokens, 'token')}"
    heat = f"temperature {rollout.temperature:g}" + (f", {rollout.truncation}" if rollout.truncation else "")
    console.print(f"step {step} of {options.run}: {drawn}, invariance={about['invariance']}, {dtype}, {heat}")
    sampler_exact, trainer_exact = SIDES[about["invariance"]]
    found: list[Relation] = []
    try:
        with console.stage("loading the weights"):
            model = load_model(weights, rollout, about, step)
        console.print(f"weights {weights}, sha256 {rollout.weights_sha256[:16]}... as recorded")
        with console.stage("starting the vLLM engine"):
            sampler = Sampler(weights, invariant=sampler_exact, dtype=dtype, **about["sampler"])
        if changed := certificate.differences(then, certificate.subject(model.config, dtype)):
            console.print(f"note: bits are promised on one machine, and since the recording changed: {'; '.join(changed)}")
        console.print(table.TITLES, style="dim")
        with console.stage("replaying"):
            for relation in relations(rollout, model, sampler, dtype, trainer_exact):
                control = relation.name.startswith("planted")
                for line in table.lines(relation, control, console.width):
                    console.print(line, style="" if control or relation.holds else "bold red")
                found.append(relation)
    except KeyboardInterrupt:
        console.print("interrupted: what was compared so far proves nothing of the rest")
        return INTERRUPTED
    code, lines = verdict(found, step, about["invariance"], bool(changed), time.monotonic() - began)
    for line in lines:
        console.print(line)
    return code


def compute_as(then: JsonRow) -> None:
    """Take the threads and the attention of a recorded run. A CPU has one attention, whatever a GPU had.

    Raises:
        UserError: the environment names another attention.
    """
    import torch

    if then["threads"]:
        torch.set_num_threads(then["threads"])
    if torch.cuda.is_available():
        choice.choose(then.get("attention", choice.AUTO))


def recorded(run: Path, step: int | None, weights: str | None = None) -> tuple["Rollout", JsonObject, str]:
    """Return the rollout of a step, what the run says of it, and where its weights are.

    Args:
        run: directory of a run.
        step: None is refused, with the steps that can be replayed.
        weights: where the weights are now; None: where the run left them.

    Raises:
        UserError: one of these is not there, with the fix.
    """
    directory = RunDir(run)
    if not (steps := rollouts.steps(run)):
        raise UserError(f"{run}: no rollout is recorded: the run stopped before its first step, or is of an older version")
    if step is None:
        raise UserError(f"replay: --step: missing; {_replayable(directory, steps)}")
    if step not in steps:
        raise UserError(f"step {step} was not recorded; {_replayable(directory, steps)}")
    others = [k for k in steps if k != step]
    try:
        rollout, about = rollouts.read(run, step)
    except UserError as error:
        raise UserError(f"{error}; replay another step: {_replayable(directory, others)}") from error
    if strange := next((name for name, known in DESCRIPTION_OF_A_RUN.items() if not known(about.get(name))), None):
        found = rollouts.quoted(about.get(strange))
        what = f"the recording of step {step} has {strange}={found}, which no run writes"
        raise UserError(f"{run}: {what}; replay another step: {_replayable(directory, others)}")
    if weights is not None:
        if not Path(weights).is_dir():
            raise UserError(f"--weights {weights}: no such directory; expected a copy of {about['weights']}")
        return rollout, about, weights
    at, gone = _weights(directory, str(about["weights"]))
    if gone:
        fix = f"name a copy of them with --weights DIR, or replay another step: {_replayable(directory, others)}"
        raise UserError(f"step {step} of {run}: its weights are gone: no directory {at}; {fix}")
    return rollout, about, at


def _weights(directory: RunDir, recorded: str) -> tuple[str, bool]:
    """Return where the weights are that a recording names, and whether they are gone from there; a hub id is not."""
    at = directory.checkpoints / recorded if recorded.startswith("checkpoint-") else Path(recorded)
    at = directory.first_adapter if recorded == directory.first_adapter.name else at
    if at.is_dir():
        return str(at), False
    kept = at.is_absolute() or at.parent in (directory.checkpoints, directory.rollouts)
    return (str(at), True) if kept else (recorded, False)


def _replayable(directory: RunDir, steps: Sequence[int]) -> str:
    """List those of some recorded steps that can be replayed, and why the others cannot."""
    can, gone, damaged = list[int](), list[int](), list[int]()
    for step in steps:
        try:
            about = rollouts.read(directory.path, step)[1]
            of = damaged if any(not known(about.get(name)) for name, known in DESCRIPTION_OF_A_RUN.items()) else can
            (gone if of is can and _weights(directory, about["weights"])[1] else of).append(step)
        except UserError:
            damaged.append(step)
    others = {"whose weights are gone": gone, "which cannot be read": damaged}
    but = "".join(f", and not {rollouts.listed(found)}, {why}" for why, found in others.items() if found)
    return f"{rollouts.listed(can)} can be replayed{but}"


def load_model(weights: str, rollout: "Rollout", about: JsonRow, step: int) -> "PreTrainedModel":
    """Load the trainer's model as it was when the step began.

    Raises:
        UserError: the weights are not those of the recorded hash.
    """
    from rlinvariant import bits, checksums
    from rlinvariant.models import lora
    from rlinvariant.verification import adapters, load

    base, directory = base_and_adapter(weights)
    if about["invariance"] != "off":
        load.configuration(base, about["dtype"])
    exact = SIDES[about["invariance"]][1]
    adapt = adapters.adapt(directory, None, 0)
    model = load.trained(base, about["dtype"], adapt) if exact else load.masters(base)
    named = [*lora.pairs(model)]
    of_shards = checksums.digest(checksums.wholes(named).items())  # as a run with weights in shards records
    if rollout.weights_sha256 not in (digest := bits.digest(named), of_shards):
        raise UserError(
            f"step {step}: {weights} has other weights (sha256 {digest[:16]}...) than the step began with "
            f"({rollout.weights_sha256[:16]}...), and nothing can be compared; --weights DIR names a copy of those"
        )
    return model


def relations(
    rollout: "Rollout", model: "PreTrainedModel", sampler: "Sampler", dtype: str, trainer_exact: bool
) -> Iterator["Relation"]:
    """Draw and score again, and compare with what is recorded; the last relation is a control where the trainer is exact.

    Args:
        rollout: what is recorded.
        model: the trainer's, with the weights that the step began with.
        sampler: the engine; it is given the weights of `model`, as the run's was.
        dtype: of activations, "bfloat16" or "float32".
        trainer_exact: whether `model` is patched; else it scores as transformers' own.
    """
    import torch

    from rlinvariant.models import lora
    from rlinvariant.trainer.score import stock_score
    from rlinvariant.verification.controls import one_ulp
    from rlinvariant.verification.relation import Relation

    sampler.sync(lora.pairs(model))
    completions = rollout.completions
    again = [c for b in rollout.batches for c in _draw(sampler, rollout, rollout.requests_of(b))]
    yield Relation("sampler, drawn again = recorded").of(again, completions)
    requests = rollout.requests
    some = range(0, len(requests), -(-len(requests) // LONE_REQUESTS))
    lone = [_draw(sampler, rollout, [requests[i]])[0] for i in some]
    yield Relation(f"sampler, {len(some)} drawn alone = recorded").of(lone, [completions[i] for i in some])
    trainer = Relation("trainer = recorded, which is the sampler's")
    if not trainer_exact:
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):  # TRL runs a stock trainer so
            scored = stock_score(model, [p for p, _, _ in requests], completions, rollout.temperature)
        trainer.add([x.numpy() for x in scored], [c.sampler_logprobs for c in completions])
        yield trainer
        return
    pair = _pair(rollout, model, sampler)
    scored = pair.batch.scored[:] = pair.score(pair.batch.requests, completions, pair.packed())
    trainer.add(scored, [c.sampler_logprobs for c in completions])
    yield trainer
    yield one_ulp(pair, getattr(torch, dtype))


def verdict(found: Sequence["Relation"], step: int, invariance: str, changed: bool, seconds: float) -> tuple[int, list[str]]:
    """Return the exit code and the last lines."""
    compared = [r for r in found if not r.name.startswith("planted")]
    blind = [r for r in found if r.name.startswith("planted") and not r.mismatched]
    wrong, of = sum(r.mismatched for r in compared), sum(r.compared for r in compared)
    if compared and all(r.holds for r in compared) and not blind:
        return OK, ["", f"exact: step {step} was replayed bit for bit, {seconds:.0f} s"]
    if not wrong:
        why = f"{blind[0].name} changed no log-prob: the comparison is blind" if blind else "nothing was compared"
        return NOT_EXACT, ["", f"not shown: {why}"]
    counts = f"{wrong:,} / {of:,} log-probs differ, {seconds:.0f} s"
    if invariance != "exact":
        return NOT_EXACT, [
            "",
            f"step {step} was not replayed bit for bit, and invariance={invariance} does not promise it: {counts}",
        ]
    why = "not all that decides bits is as it was (see the note above)" if changed else "rlinvariant bisect says where"
    return NOT_EXACT, ["", f"NOT EXACT: step {step} was not replayed: {counts}; {why}"]


def _draw(sampler: Any, rollout: "Rollout", requests: Sequence[tuple[Sequence[int], int, int]]) -> "list[Completion]":
    """Draw completions as the rollout's were drawn."""
    prompts, seeds, most = ([*column] for column in zip(*requests, strict=True))
    how = {"temperature": rollout.temperature, "stop_token_ids": rollout.stop_token_ids, **asdict(rollout.truncation)}
    return sampler.generate(prompts, seeds, max_tokens=most, **how)


def _pair(rollout: "Rollout", model: Any, sampler: Any) -> "Pair":
    """Return the rollout as `verify` knows one, without the trainer's log-probs."""
    from rlinvariant.sampler.drive import Request
    from rlinvariant.verification.pair import Batch, Pair, Sizes

    how = rollout.truncation
    requests = [Request(tuple(p), s, rollout.temperature, most, truncation=how) for p, s, most in rollout.requests]
    sizes = Sizes(len(requests), 0, rollout.max_tokens, 0, 0, FORWARD_TOKENS)
    pair = Pair(model, sampler, sizes, 0, model.config.get_text_config().vocab_size)
    pair.batch = Batch(requests, rollout.completions, [])
    return pair
