"""The settings of a process."""

import gc

import pytest

from rlinvariant import runtime


@pytest.mark.parametrize("collects", [True, False])
def test_an_import_leaves_the_collector_as_it_was(collects):
    """Also one that fails."""
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError), runtime.importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
