"""kvpress' SnapKV beside `visual_snapkv`: the same model, prompt and number of entries, each in its own environment.

    python -m venv kvpress-venv && kvpress-venv/bin/pip install kvpress
    python benchmarks/beside_kvpress.py --kvpress kvpress-venv/bin/python

The two need other releases of transformers, so each is compared with its own untouched model: only ratios compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown

SIDE = Path(__file__).parent / "side.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", type=Path, required=True, help="the Python of an environment with kvpress")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the folder of results")
    args = parser.parse_args()
    settings = {"model": "LLaVA, 12 layers of 1024, random", "device": "cpu", "threads": 1, "repeat": args.repeat}
    with Results(args.out, "beside_kvpress", settings, keys=("library", "method")) as results:
        for library, python in (("foveate", sys.executable), ("kvpress", args.kvpress)):
            command = [str(python), str(SIDE), library, "--repeat", str(args.repeat)]
            # No path of this environment, whose libraries the other cannot use.
            alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or library == "foveate"}
            done = subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=True)
            for row in map(json.loads, done.stdout.splitlines()):
                if not results.find(library=row["library"], method=row["method"]):
                    results.add(row)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
