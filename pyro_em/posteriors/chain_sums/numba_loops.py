"""How loops over sums of Gaussian chains are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Loops hold no memory of their own: without Numba's counts of who holds it calls take half the time.
_own: dict[str, Any] = {"error_model": "numpy", "cache": True, "nogil": True, "_nrt": False}
_fast = {"reassoc", "contract", "nsz", "arcp"}

plain: Callable[[Any], Any] = numba.njit(**_own)
compiled: Callable[[Any], Any] = numba.njit(fastmath=_fast, **_own)  # sums in any order
