"""How cost grows: with vocabulary, rows, prompt length, batch and answer length, and the exponents of that.

    python -m bench.scaling [--only NAME,...] [--rounds N] [--name scaling]

Writes bench/results/scaling.json and .png, in a few minutes. In every round each size of each variant is timed once, so that a
slow minute meets all points of a curve. An exponent is the slope of the least-squares line through the logarithms of size and
median; its 95 % interval comes from rounds drawn again, so it speaks of timing noise, and "worst fit", the largest distance
of a point from the line, of how little a power law may be the right curve. ``expected`` was written down beforehand.
"""
