"""The batch job behind ``python -m engine.refine``: rows in, answered rows out, resumable at any moment.

source (files to rows) -> rows (a row's turns) -> run (rows through a session) -> output (files of finished rows).
"""
