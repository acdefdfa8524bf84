"""Is a model supported, which kernels does it take, and has it been verified?"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import runtime
from rlinvariant.doctor.finding import Finding
from rlinvariant.doctor.kernels import kernels_cpu, kernels_cuda
from rlinvariant.errors import UserError, one_line
from rlinvariant.model_source import WHEELS, base_and_adapter, load_tokenizer, model_problems, source_problems, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHIPPED_RESULTS = Path(__file__).parents[1] / "bench" / "results"  # a checkout has them, a wheel has not


def of_model(model: str, cuda: bool) -> Iterator[Finding]:
    """Find out whether a model is supported, by its configuration and the trainer's audit, and which kernels it takes."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from rlinvariant.models import adapter_files, lora, unsupported
    from rlinvariant.models.limits import flash_problems

    logging.set_verbosity_error()
    runtime.quiet()
    if problems := source_problems("MODEL", model, adapters=True):
        yield Finding("model", "problem", problems[0], False)
        return
    try:
        base, adapter = base_and_adapter(model)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):  # shapes without memory
            net = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers raises on a configuration that it cannot use
        cause = one_line(error).partition(" Model type should be")[0]  # a hundred names follow
        fix = "name a directory or hub id of a causal LM that transformers loads without remote code"
        yield Finding("model", "problem", f"{model}: cannot be loaded ({cause}); {fix}", False)
        return
    layers = config.get_text_config().num_hidden_layers
    parameters = sum(p.numel() for p in net.parameters())
    yield Finding("model", "ok", f"{type(net).__name__}, {layers} layers, {parameters:,} parameters")
    device = "cuda" if cuda else "cpu"
    reasons = list(unsupported(config, device))
    if not reasons and (problems := flash_problems(model, config, device)):
        yield Finding("model", "problem", problems[0], False)
        return
    reasons = reasons or _audit(config, device)
    for reason in reasons:
        fix = "" if "invariance=off" in reason else "; choose another model, or use invariance=off"
        yield Finding("model", "problem", f"{model}: {reason}{fix}")
    if reasons:
        return
    audited = "the trainer's audit of two layers, random weights: nothing is computed outside rlinvariant.ops"
    yield Finding("model", "ok", audited)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    weights = dict.fromkeys((m.out_features, m.in_features, m.bias is not None) for m in linears)
    yield from kernels_cuda(config) if cuda else kernels_cpu(weights, ("bfloat16",))
    ranks = {}
    if adapter is not None:
        try:
            found = adapter_files.read(adapter)
            found.require_fit(net)
        except UserError as error:
            yield from (Finding("adapters", "problem", line, False) for line in str(error).splitlines())
            return
        ranks = found.ranks
        yield Finding("adapters", "ok", lora.in_words(ranks))
    try:
        load_tokenizer(tokenizer_of(base, adapter), config, "MODEL")
    except UserError as error:
        yield Finding("tokenizer", "note", f"{error}; train and serve refuse the model without one")
    yield certified(model, config, ranks)


def certified(model: str, config: "PreTrainedConfig", ranks: Mapping[str, int] | None = None) -> Finding:
    """Say whether `verify` has been here with this architecture, and with adapters of these ranks if there are any."""
    from rlinvariant.verification import certificate

    found = certificate.find(certificate.subject(config, "bfloat16", ranks=ranks))
    if found is None:
        return Finding("certificate", "note", f"none yet for this architecture here, in bfloat16: rlinvariant verify {model}")
    return Finding("certificate", "ok", f"{found['date'][:10]}, {_counted(found)}")


def known_models(cuda: bool) -> Iterator[Finding]:
    """Say which models were exact, by this machine's certificates and by the results in this source tree."""
    from rlinvariant.verification import certificate

    if here := certificate.found_here():
        names = dict.fromkeys(f"{x['model']['class']} ({_counted(x)})" for x in here)
        yield Finding("models", "ok", f"exact here, by certificates of this machine and these versions: {', '.join(names)}")
    by_machine: dict[str, list[str]] = {}
    for file in sorted(SHIPPED_RESULTS.glob("*/certificates/*.json")):
        found = json.loads(file.read_text())
        about = found["subject"]
        if found["exact"] and (about["isa"] is None) == cuda:
            versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
            by_machine.setdefault(f"{about['device']}, {versions}", []).append(file.stem)
    for machine, names in by_machine.items():
        yield Finding("models", "ok", f"exact in the results in this source tree ({machine}): {', '.join(names)}")
    for name in WHEELS:
        missing = model_problems("model", name)
        yield Finding("models", "note", missing[0]) if missing else Finding("models", "ok", f"{name} is at hand, without a hub")
    check = "any model is checked module by module: rlinvariant doctor MODEL; and proved: rlinvariant verify MODEL"
    yield Finding("models", "ok", check if here else f"no certificate of this machine and these versions; {check}")


def _counted(found: Mapping[str, Any]) -> str:
    """Say what a certificate counted, and with which weights."""
    weights = "random weights" if found["model"]["random_weights"] else f"weights of {found['model']['name']}"
    adapters = f", {found['model']['adapters']}" if found["model"].get("adapters") else ""
    return f"0 / {found['tokens']:,} tokens differed, {found['form']} form, {weights}{adapters}"


def _audit(config: Any, device: str) -> list[str]:
    """Return what the trainer's audit refuses in two layers with random weights and few tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.models import make_invariant, require_exact, two_layers

    small = two_layers(config)
    small.vocab_size = min(512, small.vocab_size)
    small.pad_token_id = None  # it may be beyond the smaller vocabulary
    try:
        with runtime.random_state_kept(), torch.device(device):
            require_exact(make_invariant(AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)))
    except UserError as error:
        return [str(error)]
    except (RuntimeError, OSError) as error:  # kernels that do not build are a finding of their own; or memory is short
        return [f"the audit did not run ({one_line(error)})"]
    return []
