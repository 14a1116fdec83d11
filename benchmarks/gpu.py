"""Measures a GPU: bandwidth, gradients compared with the CPU, training steps, encoding, latency, precision.

    python benchmarks/gpu.py [--output gpu.json] [--only step-bfloat16] [--cpu-smoke]

Models have the sizes of published models and random weights; nothing is downloaded. Each case runs in its own process
with a time limit. The results are written after each case, so an interrupted run keeps its results. At the end the
script prints a table and one JSON line. The `utilization` of step-bfloat16 is the value for `vlm2vec plan
--utilization`.

`--cpu-smoke` runs every case on the CPU with tiny models, to check the script; its results have no meaning.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_cases import CASES

LIMIT_SECONDS, LIMIT_ALL = 90, 480


def run_case(name: str, smoke: bool, limit: float) -> dict[str, Any]:
    """Runs a case in its own process; failures and timeouts are reported as results."""
    command = [sys.executable, __file__, "--case", name, *(["--cpu-smoke"] if smoke else [])]
    since = time.monotonic()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {limit:.0f} s"}
    took = round(time.monotonic() - since, 1)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        return {"error": lines[-1][:300], "took": took}
    return {**json.loads(ran.stdout.splitlines()[-1]), "took": took}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns a table with one line per case."""
    width = max(map(len, results))
    rows = []
    for name, found in results.items():
        values = ", ".join(f"{key} {value}" for key, value in found.items())
        rows.append(f"{name:<{width}}  {values}")
    return "\n".join(rows)


def main() -> None:
    """Runs the cases, or a single one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", nargs="*", choices=list(CASES))
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--cpu-smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.case:
        sys.stdout.write(json.dumps(CASES[arguments.case](arguments.cpu_smoke)) + "\n")
        return
    results: dict[str, dict[str, Any]] = {}
    since = time.monotonic()
    for name in arguments.only or CASES:
        left = LIMIT_ALL - (time.monotonic() - since)
        results[name] = (
            run_case(name, arguments.cpu_smoke, min(LIMIT_SECONDS, left)) if left > 5 else {"error": "no time"}
        )
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(table(results) + "\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
