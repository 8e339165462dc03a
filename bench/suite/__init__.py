"""Benchmarks on pytest-benchmark: operations, training step, refinement, server, each beside what else does the same.

    python -m bench.suite                  # make bench: a few minutes; writes bench/results/suite.json
    python -m bench.suite --size full      # make bench-full
    pytest bench/suite -k rms_norm         # some of them, once

pytest-benchmark times one test after the other, so that a slow minute of the machine may meet one implementation and not the
other. Therefore ``python -m bench.suite`` runs everything several times ("passes"), each in a process of its own and every
second one backwards: implementations of one piece of work stand next to each other, each is first as often as last, and
ratios are taken within a pass. Passes are also what noise is told by: rounds within a process share its memory layout
and the machine's mood, so they are no independent trials. bench.compare takes it from passes of the same direction, of which
three passes have a pair.
"""
