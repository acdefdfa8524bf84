"""`rlinvariant bisect MODEL`: where sampler and trainer differ first, by how much, and why."""

from rlinvariant.bisect.command import bisect

__all__ = ["bisect"]
