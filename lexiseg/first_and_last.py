"""A context that threads share: the first thread enters it, and the last one to leave ends it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class SharedContext:
    """Calling it gives a context that runs ``enter``'s once, however many threads are inside at a time.

    What a context sets for a whole process would otherwise be restored in whatever order threads end.
    """

    def __init__(self, enter: Callable[[], AbstractContextManager[object]]) -> None:
        self._enter, self._lock, self._inside, self._stack = enter, threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body inside."""
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._enter())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._stack.close()
