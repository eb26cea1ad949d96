"""Signed heads of a ledger: how far it had come at some time, in a file that outlives the ledger (P22).

Whoever may write to the ledger's database can rewrite all of it, hashes included, so that it is whole again. A head
that was signed before and is kept elsewhere, by an auditor for example, then no longer fits: no entry up to it can be
changed, dropped or added without a trace. A witness notices the same at once; a signed head needs no second database,
and is proof for somebody who trusts nobody's database.

The file is one line of canonical JSON (RFC 8785). What is signed is its content without `signature`, in the encoding
of DSSE, which keeps it apart from signatures of the same key over models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dpfa_hf.errors import PrivacyError
from dpfa_hf.signing import load_private_key, load_public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from dpfa_hf.ledger import Ledger

FORMAT = "dpfa-ledger-head-1"

_PAYLOAD_TYPE = "application/vnd.dpfa.ledger-head+json"
_FIELDS: dict[str, type] = {
    "format": str,
    "hash": str,
    "key": str,
    "ledger": str,
    "seq": int,
    "signature": str,
    "time": str,
}
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Head:
    """The last entry of the ledger that is called `ledger` (a hash, no name) at `time` by the signer's clock, in UTC.

    `seq` and `hash` are the entry's, and `key` is SHA-256 of the signer's public key, None for a head not yet signed.
    """

    ledger: str
    seq: int
    hash: str
    time: str
    key: str | None


def read_head(ledger: Ledger) -> Head:
    """The head of `ledger`, which is verified first and only read.

    Raises:
        PrivacyError: the ledger fails verification.
    """
    # Before verification, which sees at least the entries up to it.
    seq, last = ledger.head()
    problems = ledger.verify()
    if problems:
        raise PrivacyError(
            f"ledger {ledger.display_url} fails verification ({problems[0]}): restore a backup that passes it"
        )
    return Head(ledger.id, seq, last, datetime.now(UTC).isoformat(timespec="seconds"), key=None)


def sign_head(ledger: Ledger, private_key: str | os.PathLike[str], path: str | os.PathLike[str]) -> Head:
    """Signs the head of `ledger`, which is verified first, into the new file `path`.

    The ledger is only read. Number and time together tell how fast entries were written, so a head is for a fixed hour
    of the day or the end of a run, and not for every step (P23).

    Raises:
        PrivacyError: the ledger fails verification, the key is no EC P-256 key, or the file exists or cannot be
            written.
    """
    key = load_private_key(private_key)
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    head = replace(read_head(ledger), key=_key_id(key.public_key()))
    signature = key.sign(_signed_bytes(head), ECDSA(SHA256()))
    content = _canonical(_values(head) | {"signature": base64.b64encode(signature).decode("ascii")}) + b"\n"
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PrivacyError(f"file {path} cannot be written ({error.strerror}): name a new file") from None
    return head


def read_signed_head(path: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> Head:
    """The head in the file `path`, signed by the owner of `public_key`.

    Guarantee: a file in which any byte differs from what `sign_head` wrote is refused.

    Raises:
        PrivacyError: the file cannot be read, is damaged, or was signed by another key.
    """
    key = load_public_key(public_key)
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES)
    except OSError as error:
        raise PrivacyError(f"file {path} cannot be read ({error.strerror}): name the right file") from None
    try:
        values = json.loads(content)
        if {name: type(value) for name, value in values.items()} != _FIELDS or values["format"] != FORMAT:
            raise ValueError
        signature = base64.b64decode(values["signature"], validate=True)
        # So that not even a blank, or unused bits of the encoding, can be changed.
        again = values | {"signature": base64.b64encode(signature).decode("ascii")}
        if _canonical(again) + b"\n" != content or values["seq"] < 1:
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise PrivacyError(f"file {path} is no signed head as it was written: take another copy of it") from None
    head = Head(**{name: values[name] for name in Head.__dataclass_fields__})
    if head.key != _key_id(key):
        raise PrivacyError(
            f"file {path} was signed with another key than public_key {public_key}: name the one of that time"
        )
    try:
        key.verify(signature, _signed_bytes(head), ECDSA(SHA256()))
    except InvalidSignature:
        raise PrivacyError(f"file {path} was changed since it was signed: take another copy of it") from None
    return head


def missing_from(ledger: Ledger, head: Head) -> list[str]:
    """The problem, in one line, if the chain of `ledger` no longer has the entry of `head`; [] if it has.

    What `Ledger.verify` finds comes beside it: that says whether the chain up to the entry is whole.
    """
    if head.ledger != ledger.id:
        return ["the signed head is of another ledger: this one is a fresh one in its place, or the wrong one is named"]
    if ledger.hash_at(head.seq) != head.hash:
        return [f"entry {head.seq} is not as it was signed at {head.time}: an older copy, cut off, or rewritten"]
    return []


def _values(head: Head) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(head)}


def _signed_bytes(head: Head) -> bytes:
    """DSSE's pre-authentication encoding of the head."""
    payload = _canonical(_values(head))
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _canonical(values: dict[str, Any]) -> bytes:
    try:
        import rfc8785
    except ImportError:
        raise PrivacyError(
            'signed heads need rfc8785, which is not installed: pip install "dpfa-hf[evidence]"'
        ) from None
    return rfc8785.dumps(values)


def _key_id(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's PEM text, by which model-signing names it too."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
