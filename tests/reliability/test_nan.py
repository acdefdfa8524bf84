"""NaN and infinity planted at every place: each stops the run before it does harm, and without the check it would have done it."""

import re
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from tests.parity.harness import Run, new_trainer
from tests.trainer.plants import Plant, planted, plants, poisoned, unchecked

SMALL = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 4, "warmup_steps": 0}


def trained(plant: Plant, arithmetic_dir: str, engine: Any, directory: Path) -> tuple[Run, str]:
    """Train two steps with a plant in the second; return the run and the error that it ended with, "" if with none."""
    ppo = {"ppo": PPOConfig()} if plant.algorithm == "ppo" else {}
    run, said = new_trainer(arithmetic_dir, engine, directory, **SMALL, **ppo), ""
    with planted(run.trainer, plant):
        try:
            run.trainer.train()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return run, said


@pytest.mark.reliability
def test_every_plant_stops_the_run(arithmetic_dir, exact_engine, arithmetic_weights, tmp_path, record_reliability):
    good, harmful, problems, every = 0, 0, [], list(plants())
    for i, plant in enumerate(every):
        exact_engine.sync(arithmetic_weights)
        run, said = trained(plant, arithmetic_dir, exact_engine, tmp_path / f"{i}")
        when = "after step 2" if "checkpoint" in plant.then else "step 2"
        expected = rf"{UserError.__name__}: {when}: .*{plant.says}.*; {plant.then}; checkpoint-1 is the last$"
        saved = sorted(path.name for path in (tmp_path / f"{i}").glob("checkpoint-*"))
        in_memory = plant.place.startswith(("a weight", "the critic's weight", "exp_avg")) or "checkpoint" in plant.then
        kept = poisoned(run.trainer, tmp_path / f"{i}") if not in_memory else poisoned_files(tmp_path / f"{i}")
        if re.match(expected, said) and saved == ["checkpoint-1"] and kept is None and "\n" not in said:
            good += 1
        else:
            problems.append(f"{plant}: {said or 'no error'}; {saved}; {kept}")
        exact_engine.sync(arithmetic_weights)
        with unchecked():
            run, said = trained(plant, arithmetic_dir, exact_engine, tmp_path / f"{i}-unchecked")
        harm = poisoned(run.trainer, tmp_path / f"{i}-unchecked")
        harmful += harm is not None
        if "finite" in said or (plant.spreads and harm is None):
            problems.append(f"blind control: {plant}: {said}; {harm}")
    record_reliability("NaN", good, len(every), f"without the check, a weight or state not finite: {harmful} / {len(every)}")
    assert not problems, "\n".join(problems)


def poisoned_files(directory: Path) -> str | None:
    class Nothing:
        @staticmethod
        def _weights_and_states() -> list[Any]:
            return []

    return poisoned(Nothing(), directory)
