"""Writes what a finished run came to into a measurement file.

python -m scripts.make.run_record RUN --commit abc1234 --out docs/measurements/demo_cpu.json
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

RESULTS = ("summary.json", "real.json")
"""Files of a run; `scripts.real.run` adds the second."""


def main() -> None:
    """Joins the run's results and versions with the commit and the date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    record = read_record(parsed.run) | {
        "commit": parsed.commit,
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    parsed.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def read_record(run: Path) -> dict[str, Any]:
    """Returns what a run's files say of it, without their places."""
    record: dict[str, Any] = {}
    for name in RESULTS:
        if (run / name).is_file():
            record |= json.loads((run / name).read_text(encoding="utf-8"))
    del record["files"]
    return record | {"versions": json.loads((run / "versions.json").read_text(encoding="utf-8"))}


if __name__ == "__main__":
    main()
