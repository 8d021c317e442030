"""Time `import fastattn` beside NumPy's, each in fresh processes: python bench/import_time.py"""

import os
import statistics
import subprocess
import sys

RUNS = 15
CODE = """
import time
import numpy
start = time.perf_counter()
import fastattn
print(time.perf_counter() - start)
"""


def main() -> None:
    # Byte code is cached, as in an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(RUNS + 1):
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True
        )
        times.append(float(done.stdout) * 1e3)
    times = times[1:]  # the first run fills the disk cache and writes byte code
    print(
        f"import fastattn after numpy: median {statistics.median(times):.2f} ms, "
        f"{min(times):.2f} to {max(times):.2f} over {RUNS} processes"
    )


if __name__ == "__main__":
    main()
