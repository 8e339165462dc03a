"""The tiny checkpoints of the engine's tests."""

from tests.engine.conftest import _one_thread, oracle

__all__ = ["_one_thread", "oracle"]
