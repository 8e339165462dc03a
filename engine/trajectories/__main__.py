"""``python -m engine.trajectories``."""

import sys

from engine.trajectories.command import main

if __name__ == "__main__":
    sys.exit(main())
