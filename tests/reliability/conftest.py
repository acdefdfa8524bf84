"""One fork server for the tests of a process."""

from collections.abc import Iterator

import pytest

from tests.reliability.lab import Lab


@pytest.fixture(scope="session")
def lab(arithmetic_dir, tmp_path_factory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("reliability") / "lab", arithmetic_dir) as started:
        yield started
