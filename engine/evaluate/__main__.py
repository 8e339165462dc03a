"""``python -m engine.evaluate``."""

import sys

from engine.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
