"""The soft-cap argument of attention and projections: ``cap * tanh(z / cap)``, as in Gemma-2."""


def check_softcap(softcap: float | None) -> None:
    """Refuses what implementations would take differently; 0.0 is how configs of models write that there is none."""
    if softcap is not None and not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None or 0.0 for no cap, got {softcap}")
