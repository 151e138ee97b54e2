"""The cost of an append from 10^4 to 10^7 entries; some ten minutes and 6 GB of disk.

    python -m tests.soak.growth [LARGEST]

The same as `make bench` measures to 10^6 (tests/bench/bench_growth). Status 1 if an append with its
integration costs MAX_RATIO times the CPU of one to a small log.
"""

import sys

from tests.bench import bench_growth

LARGEST = 10_000_000
MEASURED = 20_000

if __name__ == "__main__":
    sys.exit(bench_growth.main(int(sys.argv[1]) if len(sys.argv) > 1 else LARGEST, MEASURED))
