"""Triton kernels for GPUs, one file per operation; the public functions in engine.kernels choose them.

Imported at the first use: without a GPU nothing needs Triton.
"""
