"""Keeps an audit away from the user's ledger: whatever asks for a ledger gets a fresh one in the audit's folder."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpfa_hf import database, ledger
from dpfa_hf.errors import PrivacyError


@contextlib.contextmanager
def ledgers_only_in(folder: Path) -> Iterator[None]:
    """While it lasts, every `Ledger` that anybody builds is a new SQLite file in `folder`, without a witness.

    Guarantee:
        No other database is opened by this library, read or written: names and environment are ignored, and beneath
        that, connecting anywhere else is refused, whoever asks. So an audit charges nobody, and no ledger's witness
        hears of it.
    """
    kept = ledger.Ledger

    class AuditLedger(kept):  # type: ignore[valid-type, misc]
        """A ledger of the audit's own; the user's URL is not even looked at."""

        def __init__(self, url: str | None = None, **_: Any) -> None:
            super().__init__(f"sqlite:///{folder}/{secrets.token_hex(8)}.db", witness=None)

    def only_here(self: database.Database, parsed: Any, *, create: bool) -> None:
        inside = parsed.get_backend_name() == "sqlite" and Path(parsed.database or "").parent == folder
        if not inside:
            raise PrivacyError("an audit tried to open a database that is not its own; nothing was opened")
        connect(self, parsed, create=create)

    def no_witness(url: str | None, ledger: Any) -> None:
        return None

    connect, witness = database.Database.__init__, ledger._witness_url
    holders = [
        module
        for name, module in list(sys.modules.items())
        if (name == "dpfa_hf" or name.startswith("dpfa_hf.")) and getattr(module, "Ledger", None) is kept
    ]
    database.Database.__init__ = only_here  # type: ignore[method-assign]
    ledger._witness_url = no_witness  # type: ignore[assignment]
    for module in holders:
        module.Ledger = AuditLedger  # type: ignore[attr-defined]
    try:
        yield
    finally:
        database.Database.__init__ = connect  # type: ignore[method-assign]
        ledger._witness_url = witness
        for module in holders:
            module.Ledger = kept  # type: ignore[attr-defined]
