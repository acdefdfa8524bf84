"""Hugging Face models made to compute through `rlinvariant.ops`, and the audit that proves that nothing escapes."""

from rlinvariant.models.audit import Finding, audit, audit_config, require_exact, two_layers, watch
from rlinvariant.models.limits import unsupported
from rlinvariant.models.modules import UnsupportedModel, become
from rlinvariant.models.patch import make_invariant
from rlinvariant.models.working import make_trainable, use_working_copies

__all__ = [
    "Finding",
    "UnsupportedModel",
    "audit",
    "audit_config",
    "become",
    "make_invariant",
    "make_trainable",
    "require_exact",
    "two_layers",
    "unsupported",
    "use_working_copies",
    "watch",
]
