"""Memory, open files and threads of a long run are constant; a leak of 1 MiB a step is seen within 60 steps."""

import os

import pytest

from tests.reliability.soak import WARM, extremes, growth, soak

STEPS = int(os.environ.get("SOAK_STEPS", "2000"))
SHORT, LEAK = 60, 2**20  # steps; bytes that each of them leaks
WARM_LONG = 200  # of 2,000: what is filled until then is part of no leak


@pytest.fixture
def at_home(arithmetic_dir, tmp_path, monkeypatch):
    """Return a function that soaks in a directory of its own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def start(steps: int, *arguments: str):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        return soak(steps, directory, f"model={arithmetic_dir}", "data.digits=2", *arguments)

    return start


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_a_leak_is_seen_in_a_short_run(at_home):
    """The limit is a third of the leak: the sound run stays below it, the leaking one does not."""
    sound, leaking = at_home(SHORT), at_home(SHORT, f"data.leak_mib={LEAK / 2**20}")
    assert growth(sound, WARM) < LEAK / 3, f"{growth(sound, WARM) / 2**10:.0f} KiB a step"
    assert growth(leaking, WARM) > LEAK * 2 / 3, "blind: the leak was not seen"
    assert extremes(sound, "files", WARM)[0] == extremes(sound, "files", WARM)[1]


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_a_long_run_holds_what_it_held(at_home, record_reliability):
    """Under 2 % in 2,000 steps; files and threads are counted while no thread finishes a checkpoint."""
    held = at_home(STEPS)
    since = min(WARM_LONG, STEPS // 2)
    rss = held[since]["rss"]
    grown = growth(held, since) * (STEPS - since) / rss
    files, threads = extremes(held, "files", since), extremes(held, "threads", since)
    good = grown < 0.02 and files[0] == files[1] and threads[0] == threads[1]
    control = f"memory {grown:+.2%} of {rss / 2**20:.0f} MiB, files {files}, threads {threads}; a leak of 1 MiB a step is seen"
    record_reliability("soak", STEPS if good else 0, STEPS, control)
    assert good, control
