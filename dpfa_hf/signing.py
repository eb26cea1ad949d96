"""Signatures over a model's folder, and the keys that all signatures of this package are made with.

model-signing (Sigstore's, of the OpenSSF) hashes, signs and compares; this module makes it leave nothing out. By itself
it passes over git's files, whatever a signature asks it to ignore, and folders that it may not read.

Keys are EC P-256 in PEM files, for models and for heads of the ledger alike:

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIGNATURE_NAME = "model.sig"

_CURVE = "secp256r1"
# A signature has some 200 bytes for each file.
_MOST_BYTES = 64 * 2**20
# In the text of a list of sentences, whose own quotation marks may be escaped.
_DIGESTS = re.compile(r": Expected \\?'Digest\(.*?, Actual \\?'Digest\(.*?\)\\?'(?=['\"])", re.DOTALL)


def sign_model(model_dir: str | os.PathLike[str], private_key: str | os.PathLike[str]) -> Path:
    """Signs every file of `model_dir` as it is now and returns the signature's path, `model.sig` in the folder.

    A signature that is there already is replaced. Files are hashed in pieces, so their size does not matter.

    Raises:
        PrivacyError: the folder has a link or a special file, or holds the key; the key is no EC P-256 key, or has a
            password; a file cannot be read, or the signature cannot be written.
    """
    load_private_key(private_key)
    folder = _folder(model_dir, private_key, "private_key")
    draft = folder / f".{SIGNATURE_NAME}.{os.getpid()}"
    try:
        # The draft is written after all files were hashed.
        config, _ = _config("signing", "use_elliptic_key_signer", private_key=Path(private_key))
        config.sign(folder, draft)
        os.replace(draft, folder / SIGNATURE_NAME)
    except OSError as error:
        raise PrivacyError(
            f"model_dir {folder} cannot be signed ({error.strerror}): make its files readable and the folder writable"
        ) from None
    except ValueError as error:
        raise PrivacyError(f"model_dir {folder} cannot be signed ({_shown(error)}): rename that file") from None
    finally:
        draft.unlink(missing_ok=True)
    return folder / SIGNATURE_NAME


def verify_model(model_dir: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> None:
    """Returns if `model_dir` has the very files that the owner of the key signed, and no other.

    Guarantee: every file but `model.sig` itself, hidden ones and git's included, had the signed SHA-256 when it was
    read, none was missing and none was added; links are refused. Empty folders, access rights and times of files are
    not signed, nor is the folder's own name. An older folder that the same key signed is accepted.

    Raises:
        PrivacyError: a file was changed, added or removed, there is no signature, it is damaged or by another key, or
            a file or key cannot be read.
    """
    verified_files(model_dir, public_key)


def verified_files(model_dir: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> dict[str, str]:
    """As `verify_model`; returns the signed SHA-256, in hex, of each file by its path in the folder."""
    load_public_key(public_key)
    from cryptography.exceptions import InvalidSignature

    folder = _folder(model_dir, public_key, "public_key")
    signature = folder / SIGNATURE_NAME
    if not signature.exists():
        raise PrivacyError(f"model_dir {folder} has no {SIGNATURE_NAME}: sign it with `dpfa report --sign-key`")
    if signature.stat().st_size > _MOST_BYTES:
        raise PrivacyError(f"{signature} is larger than any signature: sign the model again")
    config, whole = _config("verifying", "use_elliptic_key_verifier", public_key=Path(public_key))
    try:
        # It warns on stdout of signatures of its first versions.
        with contextlib.redirect_stdout(io.StringIO()):
            config.verify(folder, signature)
    except InvalidSignature:
        raise PrivacyError(
            f"{signature} was not made with the key of public_key {public_key}, or was changed: do not use the model"
        ) from None
    except OSError as error:
        raise PrivacyError(f"model_dir {folder} cannot be read ({error.strerror}): make its files readable") from None
    except ValueError as error:
        # Files that differ, another key, or a damaged signature, in model-signing's words.
        raise PrivacyError(f"{signature} does not verify ({_shown(error)}): do not use the model") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise PrivacyError(f"{signature} is damaged ({type(error).__name__}): do not use the model") from None
    return {each.identifier: each.digest.digest_hex for each in whole.manifest.resource_descriptors()}


def refuse_irregular(model_dir: str | os.PathLike[str]) -> None:
    """Returns if `model_dir` is a folder of files and folders that can all be listed, with no link among them.

    Raises:
        PrivacyError: it is a link itself, or holds a link, a pipe, a socket, a device or a folder that may not be read.
    """
    folder = Path(model_dir)

    def stop(error: OSError) -> None:
        raise error

    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise PrivacyError(
                f"model_dir {folder} is a link or a file: name the folder itself, since links may point elsewhere later"
            )
        for place, folders, files in os.walk(folder, onerror=stop):
            for name in (*folders, *files):
                path = os.path.join(place, name)
                mode = os.lstat(path).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise PrivacyError(
                        f"model_dir has {path!r}, a link or special file, whose content nothing can vouch for: copy "
                        "the files themselves (`cp -rL`, or `hf download --local-dir`)"
                    )
    except OSError as error:
        raise PrivacyError(f"model_dir {folder} cannot be read ({error.strerror}): name a readable folder") from None


def load_private_key(path: str | os.PathLike[str]) -> EllipticCurvePrivateKey:
    """The EC P-256 private key in the PEM file `path`.

    Raises:
        PrivacyError: it cannot be read, is no such key, or has a password.
    """
    serialization = _required("cryptography.hazmat.primitives.serialization")
    return _key("private_key", path, lambda pem: serialization.load_pem_private_key(pem, password=None))


def load_public_key(path: str | os.PathLike[str]) -> EllipticCurvePublicKey:
    """The EC P-256 public key in the PEM file `path`.

    Raises:
        PrivacyError: it cannot be read, or is no such key.
    """
    serialization = _required("cryptography.hazmat.primitives.serialization")
    return _key("public_key", path, serialization.load_pem_public_key)


def _key(name: str, path: str | os.PathLike[str], load: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = load(Path(path).read_bytes())
    except OSError as error:
        raise PrivacyError(f"{name} {path} cannot be read ({error.strerror}): name a PEM file") from None
    except TypeError:
        raise PrivacyError(
            f"{name} {path} has a password, which no job can type: decrypt it (`openssl ec`) into a file or secret "
            "that the signer alone may read"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if getattr(getattr(key, "curve", None), "name", None) != _CURVE:
        kind = name.replace("_", " ")
        raise PrivacyError(
            f"{name} {path} is not a {kind} of EC P-256 in PEM: make one with `openssl ecparam -name prime256v1 "
            "-genkey -noout -out key.pem`, and its public half with `openssl ec -in key.pem -pubout -out key.pub`"
        )
    return key


def _folder(model_dir: str | os.PathLike[str], key: str | os.PathLike[str], name: str) -> Path:
    refuse_irregular(model_dir)
    folder = Path(model_dir)
    if Path(key).resolve().is_relative_to(folder.resolve()):
        danger = "would be published with it" if name == "private_key" else "could be exchanged with it"
        raise PrivacyError(f"{name} {key} lies in the model's folder and {danger}: keep keys elsewhere")
    return folder


def _config(module: str, key_option: str, **key: Path) -> tuple[Any, Any]:
    """Of model-signing, for "signing" or "verifying": its configuration, and that of its hashing, which takes all files
    but the signature."""
    base: Any = _required("model_signing.hashing").Config

    class WholeFolder(base):
        """Keeps what it hashed in `manifest`."""

        def hash(self, model_path: Any, **options: Any) -> Any:
            self.manifest = super().hash(model_path, **options)
            return self.manifest

        def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
            # What a signature would have ignored is hashed all the same, and then is a file too many.
            pass

    whole = WholeFolder().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)
    config = getattr(_required(f"model_signing.{module}").Config(), key_option)(**key)
    return config.set_hashing_config(whole), whole


def _required(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise PrivacyError(
            f'signing needs {error.name or module}, which is not installed: pip install "dpfa-hf[evidence]"'
        ) from None


def _shown(error: Exception) -> str:
    """One line that any terminal can show; without the digests of files that differ."""
    text = " ".join(_DIGESTS.sub("", str(error)).split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else f"{text[:300]}..."
