"""What the `enable` functions of `fastattn.torch` and `fastattn.keras` return."""

from __future__ import annotations

from collections.abc import Callable


class Enabled:
    """What `enable` returns: in a ``with`` statement, the end of it restores what was before."""

    def __init__(self, was_enabled: bool, disable: Callable[[], None]) -> None:
        self._was_enabled = was_enabled
        self._disable = disable

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._was_enabled:
            self._disable()
