"""Names of tests after their parameters, alike in every process."""

import re
from typing import Any


def short(value: Any) -> str:
    """What a value looks like, without its address."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))[:50]
