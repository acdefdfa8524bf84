"""`rlinvariant replay RUN --step K`: a recorded step once more, from the weights it began with. Are the bits the same?"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import bits, runtime
from rlinvariant.arguments import Parser
from rlinvariant.conflicts import SIDES
from rlinvariant.errors import UserError
from rlinvariant.report import rollouts
from rlinvariant.report.console import Console
from rlinvariant.report.rollouts import listed
from rlinvariant.report.rundir import RunDir
from rlinvariant.rollout import Completion, Rollout

if TYPE_CHECKING:  # it imports transformers and vLLM, which a mistake need not wait for
    from rlinvariant.verification.relations import Pair, Relation

DESCRIPTION = """Replay a step that the run has recorded: step 1, and each step after a checkpoint. Loads the weights that it
began with, which must have the recorded hash; draws the same prompts with the same seeds; scores the recorded completions with
the trainer's model; counts the 32-bit log-probs that are not the recorded ones. Exit code 0: none; 1: some, which is a fault of
invariance=exact alone; 2: cannot run."""
ALONE = 8  # requests that are drawn with no other in the engine
IN_FORWARD = 8192  # most tokens in one forward of the trainer's model


def parser() -> Parser:
    p = Parser("replay", DESCRIPTION)
    p.add_argument("run", metavar="RUN", type=Path, help="the directory of a run, runs/NAME")
    p.add_argument("--step", type=int, metavar="K", help="which step, as metrics.jsonl counts them")
    p.add_argument("--weights", metavar="DIR", help="where the weights are now, if they were moved")
    return p


def command(argv: Sequence[str]) -> int:
    """Replay as `argv` says, and print the table. Returns the exit code; raises UserError."""
    options, began = parser().parse_args(argv), time.monotonic()
    run, step, console = options.run, options.step, Console()
    rollout, about, weights = recorded(run, step, options.weights)
    runtime.configure()
    runtime.quiet()
    with console.stage("loading transformers and vLLM"):
        import torch

        from rlinvariant.sampler.engine import Sampler
        from rlinvariant.verification import certificate, table
    then, completions = about["subject"], rollout.completions
    if then["threads"]:
        torch.set_num_threads(then["threads"])
    tokens = sum(len(c.token_ids) for c in completions)
    console.print(
        f"step {step} of {run}: {len(completions):,} completions, {tokens:,} tokens, invariance={about['invariance']}, "
        f"{about['dtype']}, temperature {rollout.temperature:g}"
    )
    sampler_exact, trainer_exact = SIDES[about["invariance"]]
    try:
        with console.stage("loading the weights"):
            model = load_model(weights, rollout, about, step)
        console.print(f"weights {weights}, sha256 {rollout.weights_sha256[:16]}... as recorded")
        with console.stage("starting the vLLM engine"):
            sampler = Sampler(weights, invariant=sampler_exact, dtype=about["dtype"], **about["sampler"])
        changed = differences(then, certificate.subject(model.config, about["dtype"]))
        if changed:
            console.print(f"note: not as when it was recorded, and bits are promised on one machine: {'; '.join(changed)}")
        console.print(table.TITLES, style="dim")
        found: list[Relation] = []
        with console.stage("replaying"):
            for relation in relations(rollout, model, sampler, about["dtype"], trainer_exact):
                control = relation.name.startswith("planted")
                for line in table.line(relation, control).splitlines():
                    console.print(line, style="" if control or relation.holds else "bold red")
                found.append(relation)
    except KeyboardInterrupt:
        console.print("interrupted: what was compared so far proves nothing of the rest")
        return 130
    code, lines = verdict(found, step, about["invariance"], bool(changed), time.monotonic() - began)
    for line in lines:
        console.print(line)
    return code


def recorded(run: Path, step: int | None, weights: str | None = None) -> tuple[Rollout, dict[str, Any], str]:
    """(the rollout of a step, what the run says of it, where its weights are). UserError, with the fix, if one is not there."""
    directory = RunDir(run)
    if not directory.config.is_file():
        raise UserError(f"{run}: no run there (no config.json); expected the directory of one, runs/NAME")
    if not (steps := rollouts.steps(run)):
        raise UserError(f"{run}: no rollout is recorded: the run stopped before its first step, or is of an older version")
    if step is None:
        raise UserError(f"replay: --step: missing; recorded: {listed(steps)}")
    rollout, about = rollouts.read(run, step)
    if weights is None:
        weights = str(about["weights"])
        at = directory.checkpoints / weights if weights.startswith("checkpoint-") else Path(weights)
        if at.is_dir():
            return rollout, about, str(at)
        if at.is_absolute() or at.parent == directory.checkpoints:
            others = [k for k in steps if k != step and (k == 1 or (directory.checkpoints / f"checkpoint-{k - 1}").is_dir())]
            fix = f"replay another step: {listed(others)}, or name a copy of them with --weights DIR"
            raise UserError(f"step {step} of {run}: its weights are gone: no directory {at}; {fix}")
    elif not Path(weights).is_dir():
        raise UserError(f"--weights {weights}: no such directory; expected a copy of {about['weights']}")
    return rollout, about, weights


def load_model(weights: str, rollout: Rollout, about: Mapping[str, Any], step: int) -> Any:
    """The trainer's model at the beginning of the step, and no other: its hash must be the recorded one."""
    from rlinvariant.verification import load

    if about["invariance"] != "off":
        load.configuration(weights, about["dtype"])
    exact = SIDES[about["invariance"]][1]
    model = load.trained(weights, about["dtype"]) if exact else load.masters(weights)
    if (digest := bits.digest(model.named_parameters())) != rollout.weights_sha256:
        raise UserError(
            f"step {step}: {weights} has other weights (sha256 {digest[:16]}...) than the step began with "
            f"({rollout.weights_sha256[:16]}...), and nothing can be compared; --weights DIR names a copy of those"
        )
    return model


def relations(rollout: Rollout, model: Any, sampler: Any, dtype: str, trainer_exact: bool) -> Iterator["Relation"]:
    """What was drawn and scored again, against what is recorded; the last is a control where the trainer's model is exact.

    Args:
        model, sampler: of the weights that the step began with; `sampler` is given those of `model`, as the run's was.
        dtype: "bfloat16" or "float32".
        trainer_exact: whether `model` is patched; else it is scored as transformers has it.
    """
    import torch

    from rlinvariant.trainer.score import stock_score
    from rlinvariant.verification.controls import one_ulp
    from rlinvariant.verification.relations import Relation

    sampler.sync(model.named_parameters())
    completions = rollout.completions
    again = [c for b in rollout.batches for c in _draw(sampler, rollout, b.prompts, b.seeds)]
    yield Relation("sampler, drawn again = recorded").of(again, completions)
    requests = [(p, s) for b in rollout.batches for p, s in zip(b.prompts, b.seeds, strict=True)]
    some = range(0, len(requests), -(-len(requests) // ALONE))
    apart = [_draw(sampler, rollout, [requests[i][0]], [requests[i][1]])[0] for i in some]
    yield Relation(f"sampler, {len(some)} drawn alone = recorded").of(apart, [completions[i] for i in some])
    trainer = Relation("trainer = recorded, which is the sampler's")
    if not trainer_exact:
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):  # as TRL runs a stock trainer
            scored = stock_score(model, [p for p, _ in requests], completions, rollout.temperature)
        trainer.add([x.numpy() for x in scored], [c.sampler_logprobs for c in completions])
        yield trainer
        return
    pair = _pair(rollout, model, sampler)
    scored = pair.batch.scored[:] = pair.score(pair.batch.requests, completions, pair.packed())
    trainer.add(scored, [c.sampler_logprobs for c in completions])
    yield trainer
    yield one_ulp(pair, getattr(torch, dtype))


def verdict(found: Sequence["Relation"], step: int, invariance: str, changed: bool, seconds: float) -> tuple[int, list[str]]:
    """(exit code, the last lines)."""
    compared = [r for r in found if not r.name.startswith("planted")]
    blind = [r for r in found if r.name.startswith("planted") and not r.mismatched]
    wrong, of = sum(r.mismatched for r in compared), sum(r.compared for r in compared)
    if compared and all(r.holds for r in compared) and not blind:
        return 0, ["", f"exact: step {step} was replayed bit for bit, {seconds:.0f} s"]
    if not wrong:
        why = f"{blind[0].name} changed no log-prob: the comparison is blind" if blind else "nothing was compared"
        return 1, ["", f"not shown: {why}"]
    counts = f"{wrong:,} / {of:,} log-probs differ, {seconds:.0f} s"
    if invariance != "exact":
        return 1, ["", f"step {step} was not replayed bit for bit, and invariance={invariance} does not promise it: {counts}"]
    why = "not all that decides bits is as it was (see the note above)" if changed else "rlinvariant bisect says where"
    return 1, ["", f"NOT EXACT: step {step} was not replayed: {counts}; {why}"]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides bits and is not as it was: of two `certificate.subject`s, whatever the model."""
    found = [f"{k} {then[k]} -> {now[k]}" for k in ("device", "threads") if then[k] != now[k]]
    a, b = then["packages"], now["packages"]
    found += [f"{k} {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if then["isa"] != now["isa"]:
        found.append("the processor's instructions")
    if then["sources"] != now["sources"]:
        found.append("rlinvariant's own sources")
    return found


def _draw(sampler: Any, rollout: Rollout, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
    how = {"temperature": rollout.temperature, "max_tokens": rollout.max_tokens}
    return sampler.generate(prompts, seeds, **how, stop_token_ids=rollout.stop_token_ids)


def _pair(rollout: Rollout, model: Any, sampler: Any) -> "Pair":
    """The rollout as `verify` knows one."""
    from rlinvariant.sampler.drive import Request
    from rlinvariant.verification.relations import Batch, Pair, Sizes

    requests = [
        Request(tuple(p), s, rollout.temperature, rollout.max_tokens)
        for b in rollout.batches
        for p, s in zip(b.prompts, b.seeds, strict=True)
    ]
    sizes = Sizes(len(requests), 0, rollout.max_tokens, 0, 0, IN_FORWARD)
    pair = Pair(model, sampler, sizes, 0, model.config.get_text_config().vocab_size)
    pair.batch = Batch(requests, rollout.completions, [])
    return pair
