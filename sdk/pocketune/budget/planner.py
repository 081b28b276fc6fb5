"""The process that plans: `python -m pocketune.budget.planner` reads a question and writes its answer, both as JSON."""

from __future__ import annotations

import json
import sys

from pocketune.lean import without_scipy


def main() -> None:
    """Answer one question, with the libraries that a job with a memory budget has: what it measures of them must be theirs."""
    with without_scipy():
        from pocketune.budget.planning import answer

        sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")


if __name__ == "__main__":
    main()
