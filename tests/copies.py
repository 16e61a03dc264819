"""Ways to make a second one."""

from __future__ import annotations

import copy
import pickle
from typing import Any


def pickled(original: Any) -> Any:
    """As it gets to another process."""
    return pickle.loads(pickle.dumps(original))


WAYS = [copy.deepcopy, pickled]
