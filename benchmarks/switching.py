"""What it costs to install a method and take it off again, for servers that switch methods from request to request.

python benchmarks/switching.py

Installs and removes each method on glimpse a hundred times; no model runs. Takes some seconds.
"""

import argparse
import statistics
import time

import foveate
from foveate import glimpse

TIMES = 100


def main() -> None:
    """Prints the median of each, in milliseconds."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, _ = glimpse.load()
    for method in ("divprune", "fastv", "csp", "divprune+csp"):
        spent = []
        for _ in range(TIMES):
            begun = time.perf_counter()
            foveate.prune(model, method).remove()
            spent.append(1000 * (time.perf_counter() - begun))
        print(f"{method}: {statistics.median(spent):.2f} ms")


if __name__ == "__main__":
    main()
