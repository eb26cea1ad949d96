"""What a signature over a model's folder covers: every file, byte and name, and what it refuses to sign."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpfa_hf import signing
from dpfa_hf.errors import PrivacyError
from dpfa_hf.signing import SIGNATURE_NAME, sign_model, verified_files, verify_model

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "sub/deep/part.bin": "more weights",
    ".hidden": "h",
    ".gitattributes": "g",
    ".git/config": "c",
    ".github/workflow": "w",
}


def filled(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def model(tmp_path: Path, keys: Path) -> Path:
    sign_model(filled(tmp_path / "model"), keys / "key.pem")
    return tmp_path / "model"


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(PrivacyError) as info:
        act()
    text = str(info.value)
    assert "\n" not in text and 30 < len(text) < 600 and text.isprintable()
    return text


def edited_signature(model: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    signature = json.loads((model / SIGNATURE_NAME).read_text())
    edit(signature)
    (model / SIGNATURE_NAME).write_text(json.dumps(signature))


def test_a_folder_as_it_was_signed_verifies_and_every_file_of_it_is_signed(model: Path, keys: Path) -> None:
    verify_model(model, keys / "key.pub")
    signed = verified_files(model, keys / "key.pub")
    assert set(signed) == set(FILES)
    sums = subprocess.run(["sha256sum", *FILES], cwd=model, check=True, capture_output=True, text=True).stdout
    assert sums.split() == [word for name in FILES for word in (signed[name], name)]


def test_the_folder_may_be_moved_renamed_and_signed_again(model: Path, keys: Path, tmp_path: Path) -> None:
    moved = model.rename(tmp_path / "released")
    verify_model(moved, keys / "key.pub")
    (moved / "config.json").write_text("{ }")
    assert sign_model(moved, keys / "other.pem") == moved / SIGNATURE_NAME
    verify_model(moved, keys / "other.pub")
    assert set(os.listdir(moved)) == {"config.json", "model.safetensors", "sub", ".hidden", ".gitattributes", ".git",
                                      ".github", SIGNATURE_NAME}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", ["change", "remove", "rename", "link", "append nothing but a byte"])
def test_no_file_can_be_changed_removed_renamed_or_linked(name: str, spoil: str, model: Path, keys: Path) -> None:
    path = model / name
    if spoil == "change":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif spoil == "append nothing but a byte":
        path.write_bytes(path.read_bytes() + b"\0")
    elif spoil == "rename":
        path.rename(path.with_name("other"))
    elif spoil == "remove":
        path.unlink()
    else:
        copy = shutil.copy(path, model.parent / "elsewhere")
        path.unlink()
        path.symlink_to(copy)
    text = refusal(lambda: verify_model(model, keys / "key.pub"))
    assert "Digest" not in text
    assert path.name in text and ("is a link" in text or ", a link" in text) == (spoil == "link")


@pytest.mark.parametrize(
    "name", ["new.bin", ".new", ".gitignore", ".git/hooks", ".github/new", "sub/new", "model.sig2", "sub/model.sig"]
)
def test_no_file_can_be_added_not_even_a_hidden_one_or_gits(name: str, model: Path, keys: Path) -> None:
    (model / name).write_text("payload")
    assert name in refusal(lambda: verify_model(model, keys / "key.pub"))


@pytest.mark.parametrize("kind", ["pipe", "link to a folder", "dangling link", "signature is a link"])
def test_links_and_special_files_are_refused_before_anything_is_read(kind: str, model: Path, keys: Path) -> None:
    if kind == "pipe":
        os.mkfifo(model / "pipe")
    elif kind == "signature is a link":
        shutil.move(model / SIGNATURE_NAME, model.parent / "sig")
        (model / SIGNATURE_NAME).symlink_to(model.parent / "sig")
    else:
        (model / "link").symlink_to(model.parent if kind == "link to a folder" else model / "nowhere")
    assert "link or special file" in refusal(lambda: verify_model(model, keys / "key.pub"))
    assert "link or special file" in refusal(lambda: sign_model(model, keys / "key.pem"))


def test_the_folder_must_be_one_and_no_link_to_one(model: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    for wrong in (tmp_path / "link", tmp_path / "nowhere", model / "config.json"):
        for act in (lambda w=wrong: verify_model(w, keys / "key.pub"), lambda w=wrong: sign_model(w, keys / "key.pem")):
            assert "name" in refusal(act)


def test_a_folder_that_may_not_be_listed_is_not_passed_over(keys: Path) -> None:
    # pathlib's glob, and so model-signing, leaves it out in silence; root may list any.
    with tempfile.TemporaryDirectory() as place:
        model = filled(Path(place) / "model")
        sign_model(model, keys / "key.pem")
        (model / "closed").mkdir(mode=0o700)
        (model / "closed" / "payload").write_text("p")
        is_root = os.geteuid() == 0
        (model / "closed").chmod(0o700 if is_root else 0)
        os.chmod(place, 0o755)
        try:
            if is_root:
                os.seteuid(65534)
            assert "Permission denied" in refusal(lambda: signing.refuse_irregular(model))
        finally:
            if is_root:
                os.seteuid(0)
            (model / "closed").chmod(0o700)


def test_the_refusal_names_all_files_that_differ_and_no_digest(model: Path, keys: Path) -> None:
    # Digests are random bytes, which the library shows with all sorts of quotation marks in them.
    for i in range(40):
        for name in ("config.json", "model.safetensors", ".hidden"):
            (model / name).write_text(f"{name} {i}")
        text = refusal(lambda: verify_model(model, keys / "key.pub"))
        assert all(name in text for name in ("config.json", "model.safetensors", ".hidden")) and "Digest" not in text


def test_another_key_does_not_verify(model: Path, keys: Path) -> None:
    assert "Key mismatch" in refusal(lambda: verify_model(model, keys / "other.pub"))
    # The hint in the file is for people; without it the signature itself must differ.
    edited_signature(model, lambda s: s["verificationMaterial"]["publicKey"].update(hint=None))
    assert "not made with the key" in refusal(lambda: verify_model(model, keys / "other.pub"))


def test_a_library_that_prints_does_not_get_to_stdout(
    model: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited_signature(model, lambda s: s["verificationMaterial"]["publicKey"].update(hint=None))
    verify_model(model, keys / "key.pub")
    assert capsys.readouterr().out == ""


def payload_edit(signature: dict[str, Any]) -> None:
    envelope = signature["dsseEnvelope"]
    text = base64.b64decode(envelope["payload"]).replace(b"config.json", b"CONFIG.json")
    envelope["payload"] = base64.b64encode(text).decode()


@pytest.mark.parametrize(
    "edit",
    [
        payload_edit,
        lambda s: s["dsseEnvelope"].update(signatures=[]),
        lambda s: s["dsseEnvelope"].update(payloadType="text/plain"),
        lambda s: s["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"x" * 70).decode()),
        lambda s: s.update(mediaType="application/json"),
        lambda s: s.pop("dsseEnvelope"),
        lambda s: s.pop("verificationMaterial"),
    ],
)
def test_an_edited_signature_does_not_verify(edit: Any, model: Path, keys: Path) -> None:
    edited_signature(model, edit)
    assert SIGNATURE_NAME in refusal(lambda: verify_model(model, keys / "key.pub"))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b"{" * 10])
def test_a_damaged_signature_is_refused_in_one_line(content: bytes, model: Path, keys: Path) -> None:
    (model / SIGNATURE_NAME).write_bytes(content)
    assert SIGNATURE_NAME in refusal(lambda: verify_model(model, keys / "key.pub"))


def test_a_missing_or_enormous_signature_is_refused(model: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "_MOST_BYTES", 10)
    assert "larger" in refusal(lambda: verify_model(model, keys / "key.pub"))
    (model / SIGNATURE_NAME).unlink()
    assert "has no model.sig" in refusal(lambda: verify_model(model, keys / "key.pub"))
    (model / SIGNATURE_NAME).mkdir()
    monkeypatch.undo()
    assert "cannot be read" in refusal(lambda: verify_model(model, keys / "key.pub"))


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("openssl genrsa -out {} 2048", "EC P-256"),
        ("openssl ecparam -name secp384r1 -genkey -noout -out {}", "EC P-256"),
        ("openssl genpkey -algorithm ed25519 -out {}", "EC P-256"),
        ("openssl ec -in {keys}/key.pem -aes256 -passout pass:x -out {}", "password"),
        ("cp {keys}/key.pub {}", "EC P-256"),
        ("touch {}", "EC P-256"),
        ("mkdir {}", "Is a directory"),
        ("true {}", "No such file"),
    ],
)
def test_other_keys_are_refused_for_signing(command: str, cause: str, model: Path, keys: Path, tmp_path: Path) -> None:
    words = command.format(tmp_path / "wrong.pem", keys=keys).split()
    subprocess.run(words, check=True, capture_output=True)
    before = (model / SIGNATURE_NAME).read_bytes()
    text = refusal(lambda: sign_model(model, tmp_path / "wrong.pem"))
    assert cause in text and "private_key" in text and (model / SIGNATURE_NAME).read_bytes() == before


def test_a_private_key_is_no_public_key(model: Path, keys: Path) -> None:
    assert "is not a public key" in refusal(lambda: verify_model(model, keys / "key.pem"))


def test_keys_in_the_models_folder_are_refused(model: Path, keys: Path) -> None:
    for name in ("key.pem", "key.pub"):
        shutil.copy(keys / name, model / name)
    assert "would be published" in refusal(lambda: sign_model(model, model / "key.pem"))
    (model / "key.pem").unlink()
    sign_model(model, keys / "key.pem")
    # Whoever can change the files could put a key of his own there.
    assert "could be exchanged" in refusal(lambda: verify_model(model, model / "key.pub"))


def test_a_name_that_no_signature_can_hold_is_refused_and_nothing_is_left_behind(model: Path, keys: Path) -> None:
    with open(os.fsencode(model) + b"/\xff\xfe", "w"):
        pass
    assert "rename that file" in refusal(lambda: sign_model(model, keys / "key.pem"))
    assert "Extra files" in refusal(lambda: verify_model(model, keys / "key.pub"))
    assert not [name for name in os.listdir(model) if name.startswith(f".{SIGNATURE_NAME}")]


def test_model_signings_own_command_agrees_once_told_of_gits_files(model: Path, keys: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(model), "--no-ignore-git-paths"]
    command += ["--signature", str(model / SIGNATURE_NAME), "--public_key", str(keys / "key.pub")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_what_a_foreign_signature_wants_ignored_is_not(tmp_path: Path, keys: Path) -> None:
    """The mutant: model-signing with its own settings, which lets git's files and those that it was told go."""
    from model_signing import hashing, verifying
    from model_signing import signing as stock

    model = filled(tmp_path / "model")
    ignoring = hashing.Config().set_ignored_paths(paths=["model.sig", "sub"])
    signer = stock.Config().use_elliptic_key_signer(private_key=keys / "key.pem")
    signer.set_hashing_config(ignoring).sign(model, model / SIGNATURE_NAME)
    (model / "sub" / "payload").write_text("p")
    verifying.Config().use_elliptic_key_verifier(public_key=keys / "key.pub").verify(model, model / SIGNATURE_NAME)
    text = refusal(lambda: verify_model(model, keys / "key.pub"))
    assert "Extra files" in text and "sub/payload" in text and ".git/config" in text


def test_without_model_signing_the_extra_is_named(model: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.hashing", None)
    assert 'pip install "dpfa-hf[evidence]"' in refusal(lambda: sign_model(model, keys / "key.pem"))
