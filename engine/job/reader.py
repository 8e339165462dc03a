"""Rows read ahead in a thread, so that a slow input never holds up the rows that are under way."""

import queue
import threading
from collections.abc import Iterator

from engine.job.rows import Row

WAIT_SECONDS = 0.1


class Reader:
    """Takes rows from an iterator in a thread of its own, a bounded number ahead."""

    def __init__(self, rows: Iterator[Row], ahead: int) -> None:
        self.ended = False
        """Whether every row was taken."""
        self._rows = rows
        self._queue: queue.Queue[Row | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        # a daemon, because a read from a pipe that nobody writes to cannot be ended
        self._thread = threading.Thread(target=self._read, name="engine.refine reader", daemon=True)
        self._thread.start()

    def get(self, wait: bool) -> Row | None:
        """The next row; None where there is none yet, or none any more (``ended``). Raises what reading raised."""
        if self.ended:
            return None
        try:
            item = self._queue.get(timeout=WAIT_SECONDS) if wait else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Row):
            return item
        self.ended = True
        if item is not None:
            raise item
        return None

    def close(self) -> None:
        """Stops reading; waits for the thread unless it hangs in a read."""
        self._stop.set()
        self._thread.join(2 * WAIT_SECONDS)

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            for row in self._rows:
                if not self._put(row):
                    return
        except BaseException as error:
            end = error
        self._put(end)

    def _put(self, item: Row | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=WAIT_SECONDS)
                return True
            except queue.Full:
                pass
        return False
