"""A trainer with a tool, whose ranks take other numbers of turns; DIRECTORY/RANK.json has what each saw.

accelerate launch --config_file configs/cpu2.yaml turns_on_ranks.py DIRECTORY MODEL
"""

import json
import os
import sys
from pathlib import Path


def main(directory: str, model: str) -> int:
    from accelerate import PartialState

    from tests.parity.harness import start_engine
    from tests.trainer.tool_model import tool_trainer

    PartialState(cpu=True)  # joins the ranks, before an engine makes a world of one
    rank, turns = os.environ["RANK"], []
    run = tool_trainer(model, start_engine(model), Path(directory) / "out", per_device_train_batch_size=8)
    trainer = run.trainer
    trainer.max_tool_calling_iterations = 1 if rank == "0" else 9
    generate = trainer._generate

    def recording(prompts):
        output = generate(prompts)
        turns.append([list(batch.seeds) for batch in trainer._turns.batches])
        return output

    trainer._generate = recording
    trainer.train()
    Path(directory, f"{rank}.json").write_text(json.dumps({"turns": turns, "rows": run.rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
