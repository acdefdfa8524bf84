"""Trainers with a tool: ranks take other numbers of turns, and on one the tool fails; DIRECTORY/RANK.json has what each saw.

accelerate launch --config_file configs/cpu2.yaml turns_on_ranks.py DIRECTORY MODEL [shared]    the ranks share a sampler
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def failing(how: str, fails: bool) -> Callable[[str], str]:
    def reversed_text(text: str) -> str:
        """Turn a text round.

        Args:
            text: what to turn round
        """
        if fails and how == "hangs":
            time.sleep(600)
        if fails:
            raise ValueError("of one rank")
        return text[::-1]

    return reversed_text


def main(directory: str, model: str, sampler: str = "each") -> int:
    from accelerate import PartialState

    from rlinvariant.errors import UserError
    from rlinvariant.rewards import watchdog
    from rlinvariant.sampler.group import GroupSampler
    from tests.parity.harness import start_engine
    from tests.trainer.tool_model import tool_trainer

    watchdog.KILL_AFTER_S = 600.0  # a loaded machine may answer the signal late
    PartialState(cpu=True)  # joins the ranks, before an engine makes a world of one
    rank, turns = os.environ["RANK"], []
    spread = {"kind": GroupSampler, "tensor_parallel_size": 2} if sampler == "shared" else {}
    engine = start_engine(model, **spread)
    run = tool_trainer(model, engine, Path(directory) / "out", per_device_train_batch_size=8)
    trainer = run.trainer
    trainer.max_tool_calling_iterations = 1 if rank == "0" else 9
    generate = trainer._generate

    def recording(prompts):
        output = generate(prompts)
        turns.append([list(batch.seeds) for batch in trainer._turns.batches])
        return output

    trainer._generate = recording
    trainer.train()
    seen = {"turns": turns, "rows": run.rows}
    for errors, how in (("tell", "raises"), ("stop", "raises"), ("stop", "hangs")):
        limit_s = 0.5 if how == "hangs" and rank == "1" else 600.0
        settings = {"tools": [failing(how, rank == "1")], "tool_errors": errors, "tool_timeout": limit_s, "max_steps": 1}
        run = tool_trainer(model, engine, Path(directory) / "out", per_device_train_batch_size=8, **settings)
        try:
            run.trainer.train()
            seen[f"{errors}, {how}"] = run.rows
        except UserError as error:
            seen[f"{errors}, {how}"] = str(error)
    Path(directory, f"{rank}.json").write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
