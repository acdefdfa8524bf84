"""Tools and environments at the user's border: a time limit, a cage if asked for, errors that say where.

limits.py     the settings
calls.py      the guard of a call
results.py    what a tool returns, as text
plain.py      a form of calls for models whose chat template has none
"""

from rlinvariant.tools.calls import Calls, Ended, Place, ToolBox
from rlinvariant.tools.limits import ToolLimits

__all__ = ["Calls", "Ended", "Place", "ToolBox", "ToolLimits"]
