"""``python -m fastattn bench``: fastattn beside NumPy, BLAS and the peers that are installed, in
one run on this machine, as shares of what the machine can do.

workloads.py says what is computed, contenders.py by whom, runner.py measures in processes that take
turns, report.py makes tables, JSON and comparisons of it, plots.py pictures, cli.py the command.
"""
