"""Output lengths, predicted online with 90 % bounds, on public traces: do they hold, and how far off is the middle?

    python -m benchmarks.quality.prediction --data DIR [--json FILE]

Each trace is played in its order; every answer is predicted before it is learnt.  Judged is the second half.  Beside
it stands the trivial baseline: the median and the 5 to 95 % band of the first half, and the published figures of the
data's README where there are some (constant median; median by decile of the prompt's length).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.quality.data import folder
from benchmarks.quality.traces import traces
from ondol.gateway.lengths import Lengths

GOAL = (0.85, 0.95)
PUBLISHED = {"azure code": "17.3 / 17.4", "azure conv": "145.2 / 40.5"}


def judged(pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Coverage of the stated 90 %, mean absolute error of the middle, and both of the constant baseline."""
    half = len(pairs) // 2
    lengths, inside, off = Lengths(), 0, 0.0
    for number, (prompt, output) in enumerate(pairs):
        bounds = lengths.bounds(prompt)
        if number >= half and bounds is not None:
            inside += bounds.low <= output <= bounds.high
            off += abs(output - bounds.middle)
        lengths.add(prompt, output)
    first = sorted(output for _, output in pairs[:half])
    low, high = first[int(0.05 * half)], first[int(0.95 * half)]
    middle = statistics.median(first)
    rest = [output for _, output in pairs[half:]]
    return {
        "requests": len(rest),
        "coverage": inside / len(rest),
        "error": off / len(rest),
        "constant_coverage": sum(low <= one <= high for one in rest) / len(rest),
        "constant_error": sum(abs(one - middle) for one in rest) / len(rest),
    }


def main() -> int:
    """Read the command line, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder laid out like the public data's")
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    options = parser.parse_args()
    data = folder(options.data)
    if data is None:
        return 0
    found: dict[str, dict[str, float]] = {}
    lines = [
        "| trace | judged | 90 % bounds cover | goal | constant band | error of the middle | constant median "
        "| published: constant / by prompt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, trace in traces(data, 1):
        if isinstance(trace, str):
            print(f"SKIPPED {name}: {trace}", file=sys.stderr)
            continue
        one = found[name] = judged(list(zip(trace.prompts, trace.outputs, strict=True)))
        verdict = "met" if GOAL[0] <= one["coverage"] <= GOAL[1] else "missed"
        lines.append(
            f"| {name} | {one['requests']:,} | {one['coverage']:.1%} | 85–95 %: {verdict} | "
            f"{one['constant_coverage']:.1%} | {one['error']:.1f} | {one['constant_error']:.1f} | "
            f"{PUBLISHED.get(name, '–')} |"
        )
    console = Console()
    if console.is_terminal:
        console.print(Markdown("\n".join(lines)))
    else:
        print("\n".join(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
