"""Keys that sign files: one of this machine's own, made at first use, or the user's.

Needs the package `cryptography`.
"""

import contextlib
import datetime
import os
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jvdit.machine.files import temporary_path

KEY, ROOT = "signing_key.pem", "signing_root.pem"  # in the user's config folder
_YEARS = 10
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_BEGIN = b"-----BEGIN CERTIFICATE-----"


class SigningKey(NamedTuple):
    """A key that signs, and the certificates that say whose it is.

    Attributes:
        algorithm: by the name that C2PA gives it, such as "es256".
        chain: its certificate, and those of its issuers, in PEM.
        private: the private key, in PEM (PKCS #8).
    """

    algorithm: str
    chain: bytes
    private: bytes


def local_key(folder: Path) -> SigningKey:
    """The key of this user on this machine; the first call makes it.

    Its certificate is issued by a root whose private key is thrown away, so that the
    root stands for this one key alone. `ROOT` in the folder is for those who are to
    trust it.

    Args:
        folder: that keeps the key; readable by the user alone.

    Raises:
        OSError: the folder can't be read or written.
        ValueError: the file is damaged.
    """
    file = folder / KEY
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = temporary_path(file)
        try:
            opened = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(opened, "wb") as made:
                made.write(_made())
            # A link never replaces the key that another process has made meanwhile.
            with contextlib.suppress(FileExistsError):
                os.link(scratch, file)
        finally:
            scratch.unlink(missing_ok=True)
    key = own_key(file, file)
    if not (root := folder / ROOT).exists():
        root.write_bytes(_BEGIN + key.chain.rpartition(_BEGIN)[2])
    return key


def own_key(key: Path, certificates: Path) -> SigningKey:
    """Reads a key of the user's.

    Args:
        key: file of the private key, in PEM, without a password.
        certificates: file of its certificate and those of its issuers, in PEM; perhaps
            the same.

    Raises:
        OSError: a file can't be read.
        ValueError: they are damaged, don't belong together, or are of a kind that C2PA
            doesn't know.
    """
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{key} holds no private key in PEM without a password."
        ) from error
    try:
        chain = x509.load_pem_x509_certificates(certificates.read_bytes())
    except ValueError as error:
        raise ValueError(f"{certificates} holds no certificates in PEM.") from error
    if chain[0].public_key() != private.public_key():
        raise ValueError(
            f"{certificates} is about another key than {key}; its first certificate "
            "must be that of the key."
        )
    return SigningKey(
        _algorithm(private, key), b"".join(map(_certificate, chain)), _private(private)
    )


def _algorithm(key: object, file: Path) -> str:
    """The name of the algorithm by which a key signs."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise ValueError(
        f"{file} must hold a key of the curve P-256, P-384, P-521 or Ed25519, or of "
        "RSA."
    )


def _made() -> bytes:
    """A new key, its certificate and that of its root, in PEM."""
    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = _name("jvdit local root"), _name("jvdit local signer")
    issuer = _issued(names[0], root, names[0], root, issues=True)
    own = _issued(names[1], key, names[0], root, issues=False)
    return _private(key) + _certificate(own) + _certificate(issuer)


def _name(common: str) -> x509.Name:
    parts = {NameOID.COMMON_NAME: common, NameOID.ORGANIZATION_NAME: "jvdit (local)"}
    return x509.Name([x509.NameAttribute(*part) for part in parts.items()])


def _issued(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    by: ec.EllipticCurvePrivateKey,
    issues: bool,
) -> x509.Certificate:
    """A certificate as C2PA 2.2 wants it (section 14.5), of a key or of its issuer."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    usage = dict.fromkeys(
        "content_commitment key_encipherment data_encipherment key_agreement "
        "encipher_only decipher_only".split(),
        False,
    )
    usage |= {"digital_signature": True, "key_cert_sign": issues, "crl_sign": issues}
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    extensions = [
        (x509.BasicConstraints(ca=issues, path_length=None), True),
        (x509.KeyUsage(**usage), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (identifier, False),
    ]
    if not issues:
        purpose = [ExtendedKeyUsageOID.EMAIL_PROTECTION]
        extensions.append((x509.ExtendedKeyUsage(purpose), False))
    made = x509.CertificateBuilder().subject_name(name).issuer_name(issuer)
    made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - day).not_valid_after(now + _YEARS * 365 * day)
    for extension, critical in extensions:
        made = made.add_extension(extension, critical)
    return made.sign(by, hashes.SHA256())


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _certificate(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
