"""The names that public signatures have for what no type can say; everywhere else they have types, and no `Any`.

`tests/test_types.py` lets no bare `Any` into a public signature but for those that it lists.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

# A value of JSON is recursive: with its true type, every reader of a file would have to cast what it has just checked.
Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Any]
JsonRow: TypeAlias = Mapping[str, Any]

# TRL calls a reward function by keyword, with the columns of whatever data set: it returns numbers and None, or awaits them.
RewardCall: TypeAlias = Callable[..., Any]
RewardArguments: TypeAlias = Mapping[str, Any]

# TRL calls a `rollout_func` with prompts, texts or conversations, and the trainer; it returns a dict of lists.
RolloutCall: TypeAlias = Callable[[list[Any], Any], dict[str, Any]]

# TRL calls a tool by keyword, with what the model wrote; an environment is whatever the user's class is.
ToolCall: TypeAlias = Callable[..., Any]
EnvironmentFactory: TypeAlias = Callable[[], Any]

# vLLM, `from_pretrained`, argparse's namespaces and W&B's workspaces have no types, or not those of what they make.
Untyped: TypeAlias = Any
