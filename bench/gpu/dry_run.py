"""A CPU in place of a GPU: what runs there without being asked, the kernels and the loop, though without graphs."""

import os


def prepare() -> None:
    """Before anything of the engine runs. The kernels too where TRITON_INTERPRET=1, in Triton's interpreter."""
    os.environ.setdefault("DIFFPO_LOOP", "device")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        os.environ.setdefault("DIFFPO_KERNELS", "triton")
        from tests.kernels.triton_interpreter import repair

        repair()
