"""What refinement changes: base against refined answers under a reward model, controls, latency, judges' formats.

``python -m engine.evaluate rewards | controls | report | export | import`` are the commands. ``statistics`` and ``overlap``
need NumPy alone.
"""
