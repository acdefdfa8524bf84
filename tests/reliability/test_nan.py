"""NaN and infinity planted at every place: each stops the run before it does harm, and without the check would have done it."""

import pytest

from tests.trainer.plants import plants, poisoned, stopped, tried, unchecked


@pytest.mark.reliability
def test_every_plant_stops_the_run(arithmetic_dir, exact_engine, arithmetic_weights, tmp_path, record_reliability):
    good, harmful, problems, every = 0, 0, [], list(plants())
    for i, plant in enumerate(every):
        exact_engine.sync(arithmetic_weights)
        run, said = tried(plant, arithmetic_dir, exact_engine, tmp_path / f"{i}")
        problem = stopped(plant, run, said, tmp_path / f"{i}")
        good += problem is None
        exact_engine.sync(arithmetic_weights)
        with unchecked():
            run, said = tried(plant, arithmetic_dir, exact_engine, tmp_path / f"{i}-unchecked")
        harm = poisoned(run.trainer, tmp_path / f"{i}-unchecked")
        harmful += harm is not None
        blind = f"blind control: {plant}: {said}" if "not finite" in said or (plant.spreads and harm is None) else None
        problems += [text for text in (problem, blind) if text is not None]
    record_reliability("NaN", good, len(every), f"without the check, weights or states not finite: {harmful} / {len(every)}")
    assert not problems, "\n".join(problems)
