"""The table of `trl.GRPOConfig`'s fields, made of the class.

`python -m rlinvariant.config.trl_fields` (`make fields`) writes trl_fields.json anew for the versions that are installed.
"""

import dataclasses
import enum
import json
import typing
from typing import Any, Literal

from rlinvariant.config.fields import PACKAGED_TABLE, TYPES, Table, installed
from rlinvariant.files import write_atomically


def table_of_class() -> Table:
    """Make the table of the GRPOConfig that is installed. Imports TRL."""
    from trl.trainer.grpo_config import GRPOConfig

    fields = []
    for field in dataclasses.fields(GRPOConfig):
        missing = field.default is dataclasses.MISSING
        default = typing.cast(Any, field.default_factory)() if missing else field.default
        types, choices = _types(field.type)
        doc = str(field.metadata.get("help", "")).split(". ")[0].rstrip(".")
        entry = {"name": field.name, "types": types, "choices": choices, "default": getattr(default, "value", default)}
        if field.init:
            fields.append(entry | {"doc": doc})
    return {"versions": installed(), "fields": fields}


def _types(annotation: Any) -> tuple[list[str], list[Any]]:
    """Split a field's type into names of `TYPES` and the values of its enums and Literals. An enum's `| str` is left out, so
    that a typing error is seen."""
    union = typing.get_origin(annotation) in (typing.Union, type(int | str))
    members = typing.get_args(annotation) if union else (annotation,)
    enums = [member for member in members if isinstance(member, enum.EnumMeta)]
    names = {kind: name for name, kind in TYPES.items()}
    types = ["list[str]" if _is_enum_list(member) else names.get(member) for member in members]
    choices = [item.value for member in enums for item in list[Any](member)]
    choices += [value for member in members if typing.get_origin(member) is Literal for value in typing.get_args(member)]
    return [name for name in types if name is not None and not (enums and name == "str")], choices


def _is_enum_list(member: Any) -> bool:
    return typing.get_origin(member) is list and isinstance(typing.get_args(member)[0], enum.EnumMeta)


def as_json(content: Table) -> str:
    """Write a table with one line per field, so that a change of TRL's is read in a diff."""
    lines = ",\n".join(f"  {json.dumps(field)}" for field in content["fields"])
    return f'{{"versions": {json.dumps(content["versions"])}, "fields": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    write_atomically(PACKAGED_TABLE, as_json(table_of_class()))
    print(f"{PACKAGED_TABLE}: {installed()}")
