"""See bench.report."""

import argparse
import sys
from pathlib import Path

import bench.report
from bench.report.html import standalone
from bench.report.pages import PAGES, ROOT
from bench.report.results import Results


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=bench.report.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write the pages")
    parser.add_argument("--html", type=Path, default=ROOT / "build" / "report.html", help="with --write")
    args = parser.parse_args()
    results = Results()
    differ = []
    for path, make in PAGES.items():
        text = make(path, results)
        if not path.exists() or path.read_text() != text:
            differ.append(path)
            if args.write:
                path.write_text(text)
    for path in differ:
        print(f"{'wrote' if args.write else 'differs from the results:'} {path.relative_to(ROOT)}")
    if args.write:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(standalone(results.folder / "README.md", args.html.parent))
        print(f"wrote {args.html}")
    return int(bool(differ) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
