"""Is what is installed what was tested, and does vLLM find the plugin?"""

import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from rlinvariant.doctor.finding import Finding
from rlinvariant.errors import one_line
from rlinvariant.install import PROJECT, install_hint, install_problems
from rlinvariant.sampler import plugin


def packages() -> Iterator[Finding]:
    """Compare Python and the packages with the ranges that the installed project carries from pyproject.toml."""
    try:
        requires = metadata.requires(PROJECT) or []
        expected = metadata.metadata(PROJECT)["Requires-Python"] or ""  # a tree on PYTHONPATH may have a name and no more
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError as error:  # PackageNotFoundError is one
        missing = (error.name or PROJECT).partition(".")[0]
        yield Finding("packages", "problem", f"{missing}: not installed in {sys.prefix}; {install_hint()}", False)
        return
    version = ".".join(map(str, sys.version_info[:3]))
    if not expected or not requires:
        yield Finding("packages", "note", f"{PROJECT}'s metadata names no releases to compare with; {install_hint()}")
        return
    if SpecifierSet(expected).contains(version):
        yield Finding("python", "ok", f"{version} (tested {expected})")
    else:
        yield Finding("python", "problem", f"{version}: expected {expected}; make .venv PYTHON=python3.11", False)
    for line in install_problems():
        yield Finding("packages", "problem", line, False)
    fits = []
    for requirement in map(Requirement, requires):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _package(requirement)
        if finding.verdict == "ok":
            fits.append(finding.text)
        else:
            yield finding
    yield Finding("packages", "ok", ", ".join(fits))


def vllm_package(extra: str) -> Iterator[Finding]:
    """Compare vLLM, and what else comes with the extra "cpu" or "cuda", with the ranges of the project."""
    try:
        from packaging.requirements import Requirement

        requires = [Requirement(x) for x in metadata.requires(PROJECT) or []]
    except ImportError:
        return  # `packages` has said so
    for requirement in requires:
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        finding = _package(requirement, extra)
        if not requirement.name.startswith("vllm") and finding.verdict == "problem":
            finding = Finding(requirement.name, "note", f"{finding.text} (optional)")
        yield finding


def _package(requirement: Any, extra: str = "") -> Finding:
    """Compare one installed package with its `packaging` requirement."""
    name = requirement.name
    fix = f"pip install '{name}{requirement.specifier}'" if not extra else install_hint(extra)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", f"missing: expected {requirement.specifier}; {fix}", False)
    if not requirement.specifier.contains(version, prereleases=True):
        text = f"{version}: expected {requirement.specifier}, the releases that were tested; {fix}"
        return Finding(name, "problem", text, False)
    return Finding(name, "ok", f"{name} {version}" if not extra else f"{version} (tested {requirement.specifier})")


def vllm_plugin(env: Mapping[str, str]) -> Iterator[Finding]:
    """Find out whether every process of vLLM would find the plugin: its entry point, and VLLM_PLUGINS."""
    ours = next((x for x in metadata.entry_points(group="vllm.general_plugins") if x.name == PROJECT), None)
    named = env.get("VLLM_PLUGINS")
    if ours is None:
        text = f"no entry point {PROJECT} in vllm.general_plugins of {sys.prefix}; {install_hint()}"
        yield Finding("vllm plugin", "problem", text)
        return
    try:
        registers = ours.load() is plugin.register
    except (ImportError, AttributeError) as error:
        yield Finding("vllm plugin", "problem", f"entry point {ours.value}: {one_line(error)}; install anew: {install_hint()}")
        return
    if not registers:
        yield Finding("vllm plugin", "problem", f"entry point {ours.value} is another install's; {install_hint()}")
    elif named is not None and PROJECT not in named.split(","):
        fix = f"run `unset VLLM_PLUGINS`, or add {PROJECT} to it"
        yield Finding("vllm plugin", "problem", f"VLLM_PLUGINS={named}: expected unset, or to name {PROJECT}; {fix}")
    else:
        yield Finding("vllm plugin", "ok", f"entry point {ours.value}; --engine asks a real vLLM process")
