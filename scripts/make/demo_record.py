"""Writes what a finished run came to into a measurement file.

python -m scripts.make.demo_record RUN --commit abc1234 --out docs/measurements/demo_cpu.json
"""

import argparse
import datetime
import json
from pathlib import Path


def main() -> None:
    """Joins the run's summary and versions with the commit and the date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    summary = json.loads((parsed.run / "summary.json").read_text(encoding="utf-8"))
    del summary["files"]
    record = summary | {
        "versions": json.loads((parsed.run / "versions.json").read_text(encoding="utf-8")),
        "commit": parsed.commit,
        "date": datetime.date.today().isoformat(),
    }
    parsed.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
