"""A process with one engine, which forks a run for each request.

    python -m tests.reliability.server MODEL    as a fork of `tests.forks`

Most of a run's start is importing and the engine. A fork has both already, so that a run takes a second or two, and a
hundred of them are a test. The engine is given to each run whose settings are those that it was started with; any other run
starts its own.

A line of JSON on stdin is a request: argv of `rlinvariant`, the log's path, environment, and faults: names of functions of
`faults.py` with their arguments, called in the fork before the command. A line of stdout is {"started": pid} or
{"ended": pid, "code": code}.
"""

import json
import os
import select
import sys
from typing import Any

from tests.forks import end_with

POLL_S = 0.02
ENGINE = {"max_model_len": 64, "kv_cache_gib": 0.05, "options": {"max_num_seqs": 128, "enable_prefix_caching": True}}


def share_engine(model: str) -> None:
    """Start an engine, and let each `Sampler` of the same arguments be it."""
    from rlinvariant.sampler.engine import Sampler

    start = Sampler.__init__
    settings = {"invariant": True, "dtype": "bfloat16", **ENGINE}
    settings["options"] = ENGINE["options"] | {"enforce_eager": True}
    kept = Sampler(model, **settings)

    def take(self: Sampler, source: Any, *, positions: int | None = None, **arguments: Any) -> None:
        if str(source) == model and arguments == settings:
            self.__dict__.update(kept.__dict__)
        else:
            start(self, source, positions=positions, **arguments)

    Sampler.__init__ = take


def become_a_run(request: dict[str, Any]) -> None:
    """Run a request's command in this process, which a fork has just made, and end with its exit code."""
    os.setsid()
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.environ.update(request["environment"])

    def main() -> int:
        from rlinvariant import cli
        from tests.reliability import faults

        for name, arguments in request["faults"]:
            getattr(faults, name)(**arguments)
        return cli.main(request["argv"], script="train.py")

    end_with(main)


def main(model: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from rlinvariant import runtime
    from tests.reliability import faults  # noqa: F401

    runtime.configure()
    share_engine(model)
    print("ready", file=answers)
    open_requests = True
    while open_requests:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            line = sys.stdin.readline()
            open_requests = bool(line)
            if line:
                pid = os.fork()
                if pid == 0:
                    become_a_run(json.loads(line))
                print(json.dumps({"started": pid}), file=answers)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                print(json.dumps({"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])}), file=answers)
        except ChildProcessError:
            pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
