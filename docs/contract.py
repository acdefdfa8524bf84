"""Give the Order, Bits and Ref of an op's docstring a paragraph each, on the page that mkdocstrings makes of it."""

import re
from typing import Any

import griffe


class Contract(griffe.Extension):
    """Extension of griffe, which reads the docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put a blank line and a bold title where one of the three sections begins."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(Order|Bits|Ref): ", r"\n**\1**: ", obj.docstring.value, flags=re.MULTILINE)
