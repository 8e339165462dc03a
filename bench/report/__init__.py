"""The results page, README's short version of it and the tables of other pages, made from bench/results/*.json.

    python -m bench.report          # says which pages differ from what the results say; exit status 1 if one does
    python -m bench.report --write  # writes them, and build/report.html, one file with its pictures inside

A figure is never typed: prose takes it from the results too (``templates/``), or from the committed file that states it.
"""
