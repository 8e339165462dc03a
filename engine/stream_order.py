"""Order between the streams of an engine's callers."""

from contextlib import suppress

import torch


class StreamOrder:
    """For work on tensors that all callers share, each launching on the stream that is current in its thread.

    A GPU orders what is launched on one stream. Callers on two would read what the other still writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None
        self.enter()

    def enter(self) -> None:
        """What is launched from here on comes behind all that was launched before."""
        if self._device.type != "cuda":
            return
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def wait(self) -> None:
        """Returns when the device is done with all of it; its tensors may then be freed on any stream."""
        if self._last is not None:
            with suppress(RuntimeError):  # of a device that is lost: what there is can be let go
                self._last.synchronize()
