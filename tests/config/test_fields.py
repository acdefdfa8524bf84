"""The trainer's fields are those of the GRPOConfig that is installed."""

import json
from pathlib import Path

import pytest

from rlinvariant.config import ALIASES, OWNED, TRAINER_CHOICES, TRAINER_DEFAULTS, TRAINER_OWN, fields, trl_fields
from tests.config.common import good


def test_tables_name_fields_that_trl_has() -> None:
    from trl.trainer.grpo_config import GRPOConfig

    names = set(GRPOConfig.__dataclass_fields__)
    aliases = {alias.removeprefix("trainer.") for alias in ALIASES}
    assert names >= set(OWNED) | set(TRAINER_CHOICES) | set(TRAINER_DEFAULTS) | aliases
    ours = {key.removeprefix("trainer.") for key in good().resolved() if key.startswith("trainer.")}
    assert ours == (names - set(OWNED) - aliases) | set(TRAINER_OWN) and not names & set(TRAINER_OWN)


def test_the_table_of_trls_fields_is_that_of_the_class() -> None:
    live = json.loads(trl_fields.as_json(trl_fields.table_of_class()))
    assert fields.table() == live
    packaged = json.loads(fields.PACKAGED_TABLE.read_text())
    if packaged["versions"] == fields.installed():
        assert packaged == live, "run `make fields`"


def test_other_versions_have_their_fields_from_the_class_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, made = {"trl": "1.16.9", "transformers": "5.19.9"}, []
    table = fields.table()
    monkeypatch.setenv("RLINVARIANT_CACHE", str(in_tmp / "cache"))
    monkeypatch.setattr(fields, "installed", lambda: versions)
    monkeypatch.setattr(trl_fields, "table_of_class", lambda: made.append(1) or table | {"versions": versions})
    assert fields.table() == fields.table() == table | {"versions": versions} and made == [1]
    (in_tmp / "file").touch()
    monkeypatch.setenv("RLINVARIANT_CACHE", str(in_tmp / "file"))  # no directory can be made there
    assert fields.table()["versions"] == versions and made == [1, 1]


def test_every_choice_of_an_enum_is_taken_by_trl(in_tmp: Path) -> None:
    """GRPOConfig makes enums of strings itself."""
    config = good("trainer.lr_scheduler_type=cosine", "trainer.save_strategy=epoch", "trainer.optim=sgd", "run=one")
    args = config.grpo_config()
    assert (args.lr_scheduler_type.value, args.save_strategy.value, args.optim.value) == ("cosine", "epoch", "sgd")
