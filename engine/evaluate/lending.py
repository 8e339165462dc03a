"""One loaded refiner for several jobs, each of which closes what it was given."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.job.run import RefinerLike, SessionLike
from engine.options import RefineOptions
from engine.request import Request

if TYPE_CHECKING:
    from engine.refiner import Refiner


class Shared:
    """Loads the refiner when it is first taken, and closes it in the end."""

    def __init__(self, load: "Callable[[], Refiner]") -> None:
        self._load = load
        self._refiner: Refiner | None = None

    def take(self) -> RefinerLike:
        """The refiner, to be closed without effect."""
        if self._refiner is None:
            self._refiner = self._load()
            self._warm_up(self._refiner)
        return _Lent(self._refiner)

    def close(self) -> None:
        if self._refiner is not None:
            self._refiner.close()
        self._refiner = None

    def _warm_up(self, refiner: RefinerLike) -> None:
        """What is done once only, such as choosing kernels, belongs to no variant's seconds."""
        with closing(refiner.session(RefineOptions(max_new_tokens=4))) as session:
            if session.add(Request(prompt="Hello", draft="Hello there"), 0) is None:
                while not session.step():
                    pass


@dataclass(frozen=True, slots=True)
class _Lent:
    refiner: RefinerLike

    @property
    def max_batch_size(self) -> int:
        return self.refiner.max_batch_size

    def session(self, options: RefineOptions) -> SessionLike:
        return self.refiner.session(options)

    def close(self) -> None:
        """The next job goes on with it."""
