"""examples/one_step.py, run as a reader runs it: what it prints is what it claims."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_step.py"
LINE = re.compile(r"(?P<what>[^:]+)(?P<control>, control: [^:]+)?: mismatched (?P<count>\d+) / (?P<total>\d+)(?P<first>; .*)?")
WITHOUT_TRL = "import runpy, sys; sys.modules['trl'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"


def test_every_token_matches_before_and_after_each_step_and_the_control_is_seen():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRL, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in map(LINE.fullmatch, done.stdout.splitlines()) if line]
    assert [line["what"] for line in lines] == ["step 0", "step 0", "step 1", "step 1", "after 2 steps"]
    for line in lines:
        count, total = int(line["count"]), int(line["total"])
        assert total >= 32 * 16, "32 completions of up to 24 tokens: too few to say anything"
        if line["control"]:
            assert count > 0.9 * total, "a step of AdamW moves every weight, and with them nearly every log-prob"
            assert "first at (" in line["first"]
        else:
            assert count == 0 and line["first"] is None


def test_the_example_stays_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 130
