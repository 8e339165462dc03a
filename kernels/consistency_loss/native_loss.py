"""The consistency loss in C++ for the CPU."""

from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem


def reason_against(p: Problem) -> str | None:
    """Why the C++ implementation cannot take the problem, or None."""
    return "it is not built"


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """As the reference."""
    raise NotImplementedError
