"""The seconds that a program spends in attention, for the examples that compare two of them."""

import time
from typing import Any


class Stopwatch:
    """Call an attention and add up its seconds, with those of its backward pass under PyTorch."""

    def __init__(self, attend: Any) -> None:
        self.attend = attend
        self.seconds = 0.0
        self._since = 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._start()
        out = self.attend(*args, **options)
        self._stop()
        node = getattr(out, "grad_fn", None)  # what will compute the gradients
        if node is not None:
            node.register_prehook(self._start)
            node.register_hook(self._stop)
        return out

    def _start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since
