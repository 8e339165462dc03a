"""Columns of the state of Jacobi iteration, as kernels read them."""

import triton.language as tl

from engine.kernels import jacobi_state
from engine.kernels.jacobi_state import Field, Phase

PHASE, KNOWN, VALID, GUESSED = (tl.constexpr(int(f)) for f in (Field.PHASE, Field.KNOWN, Field.VALID, Field.GUESSED))
PLANNED, WANTED, STEPS, ROWS = (tl.constexpr(int(f)) for f in (Field.PLANNED, Field.WANTED, Field.STEPS, Field.ROWS))
CONVERGED, MAY_END, IN_RUN = (tl.constexpr(int(f)) for f in (Field.CONVERGED, Field.MAY_END, Field.IN_RUN))
BLOCK_END, BLOCK_STEPS = (tl.constexpr(int(f)) for f in (Field.BLOCK_END, Field.BLOCK_STEPS))
EXPECTED, ITERATE, DRAFT = (tl.constexpr(int(f)) for f in (Field.EXPECTED, Field.ITERATE, Field.DRAFT))
BASE, LIMIT, WINDOW = (tl.constexpr(int(f)) for f in (Field.BASE, Field.LIMIT, Field.WINDOW))
CONCURRENCY, STEP_LIMIT = (tl.constexpr(int(f)) for f in (Field.CONCURRENCY, Field.STEP_LIMIT))
BLOCK_SIZE, REALIGN = (tl.constexpr(int(f)) for f in (Field.BLOCK_SIZE, Field.REALIGN))
WIDTH = tl.constexpr(len(Field))
RATES = tl.constexpr(len(jacobi_state.Rate))

RUNNING, EOS, LENGTH = (tl.constexpr(int(p)) for p in (Phase.RUNNING, Phase.EOS, Phase.LENGTH))
OUT_OF_STEPS, NAN = (tl.constexpr(int(p)) for p in (Phase.STEPS, Phase.NAN))

MOST_GUESSES = tl.constexpr(jacobi_state.MOST_GUESSES)
LONGEST_MATCH = tl.constexpr(jacobi_state.LONGEST_MATCH)
NEARBY = tl.constexpr(jacobi_state.NEARBY)
LENGTH_UNIT = tl.constexpr(jacobi_state.LENGTH_UNIT)
