"""A YAML file of settings, `config=FILE`: the keys of the command line, dotted or nested by section."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from chz.blueprint import Castable

from rlinvariant.errors import one_line
from rlinvariant.text import shown

SECTIONS = ("data", "trainer", "ppo", "lora", "sampler", "wandb")
REFUSED = {"machine": "not a setting of the run; write machine= on the command line", "config": "one file cannot name another"}
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Setting:
    """Holds what a file says of a key: a scalar as the command line would have it, and the line where it stands."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """Reads YAML without aliases, by which a small file could hold a huge value, and with 1e-6 as the number that it is."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias: write the value out", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_file(path: str) -> tuple[dict[str, Setting], list[str]]:
    """Read a file's settings, key -> setting, and list what is wrong with the file, one line each."""
    given, settings, problems = f"config={shown(path)}", dict[str, Setting](), list[str]()
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        entries = [] if node is None else list(_entries(loader, node))
    except OSError as error:
        return {}, [f"{given}: cannot be read ({error.strerror}); give the path of a YAML file"]
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return {}, [f"{shown(path)}{line}: not YAML: {one_line(error.problem)}; mend the file"]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        return {}, [f"{given}: not YAML: {one_line(error)}; mend the file"]
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        return {}, [f"{given}: expected keys with values, such as `steps: 100`, found {found}"]
    for key, value, line in entries:
        where = f"{shown(path)}:{line}: {shown(key)}"
        if key in REFUSED:
            problems.append(f"{where}: {REFUSED[key]}")
        elif value is _NO_MAPPING:
            problems.append(f"{where}: expected keys with values below it, such as `{key}:` and, indented, `name: value`")
        elif key in settings:
            problems.append(f"{where}: set in line {settings[key].line} too; keep one")
        else:
            settings[key] = Setting(value, line)
    return settings, problems


_NO_MAPPING = object()


def _entries(loader: _Loader, node: yaml.Node, section: str = "") -> Iterator[tuple[str, Any, int]]:
    """Yield each dotted key with its value and its line."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value in node.value:
        key, line = f"{section}{_text(key_node)}", key_node.start_mark.line + 1
        if not section and key in SECTIONS:
            if isinstance(value, yaml.MappingNode):
                yield from _entries(loader, value, f"{key}.")
            else:
                yield key, _NO_MAPPING, line
        else:
            yield key, _value(loader, value), line


def _text(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else "(a key that is no text)"


def _value(loader: _Loader, node: yaml.Node) -> Any:
    """Return a scalar, or a list of them, as the text that the command line would have, which the field's type then reads."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == NULL else Castable(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        texts = [_text(item) for item in node.value]
        return texts if any("," in text for text in texts) else Castable(",".join(texts))
    return loader.construct_object(node, deep=True)
