"""What a signed head proves: that a ledger still has every entry that it had when the head was signed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from dpfa_hf import cli, signed_heads
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger, restore_ledger
from dpfa_hf.signed_heads import missing_from, read_signed_head, sign_head
from dpfa_hf.signing import load_private_key

ASK: dict[str, Any] = {
    "dataset": "reviews",
    "plan": {"noise_multiplier": 1.1},
    "plan_hash": "a" * 64,
    "epsilon": 1.0,
    "delta": 1e-6,
    "max_steps": 9,
    "privacy_unit": "example",
    "adjacency": "zero_out",
    "budget": (5.0, 1e-4),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A ledger with two runs of three steps each."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    with Ledger(url) as ledger:
        for _ in range(2):
            run = ledger.open_run(**ASK)
            for step in (1, 2, 3):
                ledger.charge_step(run, step)
            ledger.end_run(run, "done")
    return url


@pytest.fixture
def file(url: str, keys: Path, tmp_path: Path) -> Path:
    with Ledger(url, create=False) as ledger:
        sign_head(ledger, keys / "key.pem", tmp_path / "head.json")
    return tmp_path / "head.json"


def go_on(url: str) -> None:
    """One more run, as after any head."""
    with Ledger(url) as ledger:
        ledger.charge_step(ledger.open_run(**ASK), 1)


def found(url: str, file: Path, keys: Path) -> tuple[bool, bool]:
    """(whether the ledger by itself is seen to be broken, whether the signed head tells)."""
    head = read_signed_head(file, keys / "key.pub")
    with Ledger(url, create=False) as ledger:
        return bool(ledger.verify()), bool(missing_from(ledger, head))


def dpfa(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_signed_head_is_the_ledgers_and_holds_no_secret(url: str, file: Path, keys: Path) -> None:
    head = read_signed_head(file, keys / "key.pub")
    with Ledger(url) as ledger:
        assert (head.seq, head.hash) == ledger.head() == (12, ledger.hash_at(12)) and head.ledger == ledger.id
        assert ledger._secret not in file.read_text() and ledger.hash_at(13) is None
    assert file.read_bytes().count(b"\n") == 1 and set(json.loads(file.read_bytes())) == {
        "format", "hash", "key", "ledger", "seq", "signature", "time",
    }  # fmt: skip


def test_openssl_alone_can_verify_it(file: Path, keys: Path, tmp_path: Path) -> None:
    import base64
    import subprocess

    values = json.loads(file.read_bytes())
    (tmp_path / "sig").write_bytes(base64.b64decode(values.pop("signature")))
    # For this content sorted keys without blanks are RFC 8785's form.
    payload = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    kind = b"application/vnd.dpfa.ledger-head+json"
    (tmp_path / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    command = ["openssl", "dgst", "-sha256", "-verify", str(keys / "key.pub"), "-signature", str(tmp_path / "sig")]
    assert b"Verified OK" in subprocess.run([*command, str(tmp_path / "signed")], capture_output=True).stdout


def test_no_byte_of_the_file_can_be_flipped_dropped_added_or_doubled(file: Path, keys: Path) -> None:
    good = file.read_bytes()
    wrong = [good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :] for i in range(len(good)) for bit in (1, 0x80)]
    wrong += [good[:i] + good[i + 1 :] for i in range(len(good))] + [good[:i] for i in range(0, len(good), 9)]
    wrong += [good[:i] + b" " + good[i:] for i in range(0, len(good) + 1, 5)] + [good + good, b" " + good, good + b"\n"]
    wrong = [each for each in wrong if each != good]
    accepted = []
    for each in wrong:
        file.write_bytes(each)
        try:
            read_signed_head(file, keys / "key.pub")
            accepted.append(each)
        except PrivacyError as error:
            assert "\n" not in str(error) and "file " in str(error)
    assert len(wrong) > 1200 and accepted == []
    file.write_bytes(good)
    read_signed_head(file, keys / "key.pub")


def test_without_the_canonical_form_some_bytes_could_be_changed(
    file: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test above: a reader that does not hold the file against its canonical form."""
    values = json.loads(file.read_bytes())
    for wrong in (json.dumps(values, indent=1), json.dumps(values)):
        file.write_text(wrong + "\n")
        with pytest.raises(PrivacyError, match="as it was written"):
            read_signed_head(file, keys / "key.pub")
    canonical = signed_heads._canonical
    whatever = lambda values: file.read_bytes()[:-1] if "signature" in values else canonical(values)  # noqa: E731
    monkeypatch.setattr(signed_heads, "_canonical", whatever)
    assert read_signed_head(file, keys / "key.pub").seq == 12


@pytest.mark.parametrize("field", ["ledger", "seq", "hash", "time", "key", "format"])
def test_no_field_can_be_replaced_in_canonical_form(field: str, file: Path, keys: Path) -> None:
    values = json.loads(file.read_bytes())
    values[field] = 3 if field == "seq" else "b" * 64
    file.write_bytes(signed_heads._canonical(values) + b"\n")
    with pytest.raises(PrivacyError):
        read_signed_head(file, keys / "key.pub")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 4000, b"{" * 4000, b'{"seq": 1e999}', b"x" * 100_000]
)
def test_what_is_no_signed_head_is_refused_in_one_line(content: bytes, file: Path, keys: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(PrivacyError, match="no signed head"):
        read_signed_head(file, keys / "key.pub")


def test_another_key_and_a_signature_over_a_model_are_refused(url: str, file: Path, keys: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    with pytest.raises(PrivacyError, match="another key"):
        read_signed_head(file, keys / "other.pub")
    # The right key over the bare content, as another tool would sign it: DSSE's type keeps the two apart.
    import base64

    values = json.loads(file.read_bytes())
    bare = signed_heads._canonical({name: value for name, value in values.items() if name != "signature"})
    made = load_private_key(keys / "key.pem").sign(bare, ECDSA(SHA256()))
    values["signature"] = base64.b64encode(made).decode()
    file.write_bytes(signed_heads._canonical(values) + b"\n")
    with pytest.raises(PrivacyError, match="changed since it was signed"):
        read_signed_head(file, keys / "key.pub")


# ---- the ledger -----------------------------------------------------------------------------------------------------


def test_a_ledger_that_went_on_still_has_its_head(url: str, file: Path, keys: Path, tmp_path: Path) -> None:
    assert found(url, file, keys) == (False, False)
    go_on(url)
    assert found(url, file, keys) == (False, False)
    with Ledger(url) as ledger:
        ledger.backup(tmp_path / "backup.jsonl")
    restored = f"sqlite:///{tmp_path}/restored.db"
    restore_ledger(tmp_path / "backup.jsonl", restored, unwitnessed=True).close()
    assert found(restored, file, keys) == (False, False)


EDITS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    # What the second run reserved, a tenth of it.
    "cheaper": lambda entries: [
        each | {"payload": each["payload"].replace('"epsilon":1.0', '"epsilon":0.1')} for each in entries
    ],
    "without the second run": lambda entries: [each for each in entries if each["run"] in ("", entries[2]["run"])],
    "cut off": lambda entries: entries[:-2],
    "other reason": lambda entries: [
        each | {"payload": each["payload"].replace('"done"', '"crash"')} for each in entries
    ],
    "runs swapped": lambda entries: [entries[i] for i in (0, 1, 7, 8, 9, 10, 11, 2, 3, 4, 5, 6)],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("with_more", [False, True])
def test_a_consistent_rewrite_is_seen_by_the_signed_head_and_by_the_witness_alone(
    edit: str, with_more: bool, url: str, file: Path, keys: Path, rewrite_ledger: Any, tmp_path: Path
) -> None:
    witness = f"sqlite:///{tmp_path}/witness.db"
    shutil.copy(tmp_path / "ledger.db", tmp_path / "twin.db")
    witnessed = f"sqlite:///{tmp_path}/twin.db"
    with Ledger(witnessed, witness=witness) as ledger:
        ledger.start_witness()
    for each in (url, witnessed):
        rewrite_ledger(each, EDITS[edit])
    if with_more:
        go_on(url)
    assert found(url, file, keys) == (False, True)
    with Ledger(witnessed, witness=witness, create=False) as ledger:
        assert any("witness" in problem for problem in ledger.verify())


def test_rewriting_without_a_change_is_no_change(url: str, file: Path, keys: Path, rewrite_ledger: Any) -> None:
    """So that the test above fails for what was changed, and not for how."""
    rewrite_ledger(url, lambda entries: entries)
    assert found(url, file, keys) == (False, False)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE dpfa_entries SET payload = replace(payload, '1', '2') WHERE seq = 4",
        "UPDATE dpfa_entries SET prev = printf('%064d', 0) WHERE seq = 5",
        "UPDATE dpfa_entries SET hash = printf('%064d', 0) WHERE seq = 12",
        "UPDATE dpfa_entries SET kind = 'resume' WHERE seq = 6",
        "DELETE FROM dpfa_entries WHERE seq = 6",
        "DELETE FROM dpfa_entries WHERE seq = 12",
        "UPDATE dpfa_entries SET seq = CASE seq WHEN 4 THEN -5 WHEN 5 THEN -4 END WHERE seq IN (4, 5); "
        "UPDATE dpfa_entries SET seq = -seq WHERE seq < 0",
        "INSERT INTO dpfa_entries SELECT 13, run, kind, payload, hash, prev FROM dpfa_entries WHERE seq = 12",
    ],
)
def test_a_careless_edit_is_seen_by_the_chain_itself(statement: str, url: str, file: Path, keys: Path) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for each in statement.split("; "):
            assert connection.exec_driver_sql(each).rowcount > 0
    engine.dispose()
    assert found(url, file, keys)[0]


def test_an_older_copy_and_a_fresh_ledger_in_its_place_are_seen(
    url: str, file: Path, keys: Path, tmp_path: Path
) -> None:
    shutil.copy(tmp_path / "ledger.db", tmp_path / "old.db")
    go_on(url)
    with Ledger(url) as ledger:
        sign_head(ledger, keys / "key.pem", tmp_path / "later.json")
    shutil.copy(tmp_path / "old.db", tmp_path / "ledger.db")
    assert found(url, file, keys) == (False, False) and found(url, tmp_path / "later.json", keys) == (False, True)
    (tmp_path / "ledger.db").unlink()
    go_on(url)
    head = read_signed_head(file, keys / "key.pub")
    with Ledger(url) as ledger:
        assert "another ledger" in missing_from(ledger, head)[0]


def test_no_broken_ledger_is_signed_and_no_file_overwritten(url: str, file: Path, keys: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    with Ledger(url) as ledger, pytest.raises(PrivacyError, match="File exists"):
        sign_head(ledger, keys / "key.pem", file)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM dpfa_entries WHERE seq = 6")
    engine.dispose()
    with Ledger(url) as ledger, pytest.raises(PrivacyError, match="fails verification"):
        sign_head(ledger, keys / "key.pem", tmp_path / "new.json")
    assert file.read_bytes() == before and not (tmp_path / "new.json").exists()


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_commands_sign_and_verify(url: str, keys: Path, tmp_path: Path, rewrite_ledger: Any) -> None:
    file = tmp_path / "signed.json"
    signed = dpfa("ledger", "head", "--ledger", url, "--sign-key", keys / "key.pem", "--out", file, "--json")
    told = json.loads(signed.stdout)
    assert signed.exit_code == 0 and told["seq"] == 12 and told["file"] == str(file)
    plain = dpfa("ledger", "head", "--ledger", url, "--json")
    assert json.loads(plain.stdout) | {"time": ""} == told | {"key": None, "file": None, "time": ""}
    assert f"head 12 {told['hash']}" in dpfa("ledger", "head", "--ledger", url).stdout
    verify = ("ledger", "verify", "--ledger", url, "--signed-head", file, "--public-key", keys / "key.pub", "--json")
    assert (good := dpfa(*verify)).exit_code == 0 and json.loads(good.stdout)["ok"] is True
    rewrite_ledger(url, EDITS["cheaper"])
    bad = dpfa(*verify)
    assert bad.exit_code == 1 and "entry 12 is not as it was signed" in json.loads(bad.stdout)["problems"][0]
    without = dpfa("ledger", "verify", "--ledger", url, "--json")
    assert without.exit_code == 0 and json.loads(without.stdout)["ok"] is True


@pytest.mark.parametrize(
    "options",
    [
        ("head", "--sign-key", "{keys}/key.pem"),
        ("head", "--out", "{keys}/new"),
        ("verify", "--public-key", "{keys}/key.pub"),
        ("verify", "--signed-head", "{keys}/key.pub"),
    ],
)
def test_half_of_a_pair_of_options_is_wrong_usage(options: tuple[str, ...], url: str, keys: Path) -> None:
    result = dpfa("ledger", *(each.format(keys=keys) for each in options), "--ledger", url)
    assert result.exit_code == 2 and "both or neither" in result.stderr


def test_a_head_of_no_ledger_creates_none(tmp_path: Path, keys: Path) -> None:
    missing = f"sqlite:///{tmp_path}/none.db"
    result = dpfa("ledger", "head", "--ledger", missing, "--sign-key", keys / "key.pem", "--out", tmp_path / "head")
    assert result.exit_code == 1 and result.stderr.startswith("dpfa: there is no ledger")
    assert not (tmp_path / "none.db").exists() and not (tmp_path / "head").exists()
