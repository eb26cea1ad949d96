"""Write the privacy sections of the cards in this folder from the reports beside them (`make cards`).

    python model_cards/regenerate.py            # rewrite what is out of date
    python model_cards/regenerate.py --check    # write nothing; exit code 1 if a card is out of date

Each folder holds the `privacy.json` of a run that was really made, as its card says, and the card. What surrounds the
section is written by hand and kept. The weights are not here: run the example to get them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from dpfa_hf.evidence.building import audited_report
from dpfa_hf.report import CARD_NAME, REPORT_NAME, write_card

HERE = Path(__file__).resolve().parent


def fresh_card(folder: Path) -> bytes:
    """The card of `folder`, with the section that its report has today."""
    report, _ = audited_report(folder)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / CARD_NAME, scratch)
        write_card(scratch, report)
        return (Path(scratch) / CARD_NAME).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a card is out of date.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="Default: the folder of this script.")
    arguments = parser.parse_args()
    folders = sorted(report.parent for report in arguments.folder.glob(f"*/{REPORT_NAME}"))
    if not folders:
        sys.exit(f"There is no {REPORT_NAME} in the folders of {arguments.folder}.")
    stale = [folder for folder in folders if fresh_card(folder) != (folder / CARD_NAME).read_bytes()]
    if arguments.check and stale:
        sys.exit(f"Out of date, so run `make cards`: {', '.join(folder.name for folder in stale)}")
    for folder in stale:
        (folder / CARD_NAME).write_bytes(fresh_card(folder))
        print(f"wrote {folder.name}/{CARD_NAME}")
    print(f"{len(folders)} cards are as their reports say")


if __name__ == "__main__":
    main()
