"""Ranked responses to train on: collected from models, scored, looked at, read.

``python -m engine.trajectories build | score | inspect`` are the commands, ``load`` gives training its trajectories.
"""

from engine.trajectories.dataset import load
from engine.trajectories.schema import BadRow, Response, TrajectoryRow, read_rows

__all__ = ["BadRow", "Response", "TrajectoryRow", "load", "read_rows"]
