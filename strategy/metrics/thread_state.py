"""State that threads do not share, and copies of a model neither."""

import threading
from typing import Any


class ThreadState(threading.local):
    """Base of the state of a thread's forward call; a copy begins with the defaults, since it is in no call."""

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return type(self), ()
