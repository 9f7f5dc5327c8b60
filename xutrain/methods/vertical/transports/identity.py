"""Who a party is: its certificate and key, and the authority that all parties trust. Standard X.509, made by ``cryptography``.

A folder holds ``ca.pem``, ``NAME.pem`` and ``NAME.key``. The certificate's DNS name is the party's name: a peer is checked by name, not
by address, so proxies and port forwarding do not matter. Real consortia bring certificates of their own authority.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xutrain.errors import DataError, Issue, UsageError


@dataclass(frozen=True)
class Identity:
    """PEM bytes of one party."""

    party: str
    authority: bytes
    certificate: bytes
    key: bytes


def need_extra() -> None:
    """Raises UsageError where the packages for real parties are not installed."""
    import importlib.util

    missing = [m for m in ("grpc", "google.protobuf", "cryptography") if _absent(m, importlib.util.find_spec)]
    if missing:
        what = f"needs {', '.join(missing)}, not installed here"
        raise UsageError(
            Issue(
                "xutrain vertical",
                what,
                has_value=False,
                hint="pip install 'xutrain[vertical]'; `xutrain vertical --config ...` simulates without",
            )
        )


def _absent(module: str, find: object) -> bool:
    try:
        return find(module) is None  # type: ignore[operator]
    except ModuleNotFoundError:
        return True


def load(folder: Path, party: str) -> Identity:
    """Raises DataError where a file is missing, unreadable, of another party, out of date, or where key and certificate are no pair."""
    files = [folder / "ca.pem", folder / f"{party}.pem", folder / f"{party}.key"]
    for file in files:
        if not file.is_file():
            raise DataError(Issue("--identity", "no such file", str(file), f"the folder must hold ca.pem, {party}.pem and {party}.key"))
    found = Identity(party, *(f.read_bytes() for f in files))
    _check(found, *files)
    return found


def days_left(identity: Identity) -> float:
    """Until the certificate expires."""
    from cryptography import x509

    left = x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    return left / datetime.timedelta(days=1)


def _check(identity: Identity, authority: Path, certificate: Path, key: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    def parsed(file: Path, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, TypeError) as reason:  # TypeError: a key with a password
            raise DataError(Issue(str(file), f"cannot be read: {str(reason).splitlines()[0][:100]}", has_value=False)) from None

    parsed(authority, lambda: x509.load_pem_x509_certificate(identity.authority))
    own = parsed(certificate, lambda: x509.load_pem_x509_certificate(identity.certificate))
    private = parsed(key, lambda: serialization.load_pem_private_key(identity.key, None))
    if private.public_key() != own.public_key():
        raise DataError(Issue(str(key), f"is not the key of {certificate.name}", has_value=False))
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = []
    if identity.party not in names:
        what = f"is for {', '.join(names) or 'no DNS name'}"
        raise DataError(Issue(str(certificate), what, identity.party, "its DNS name must be the party's name"))
    if not own.not_valid_before_utc <= datetime.datetime.now(datetime.timezone.utc) <= own.not_valid_after_utc:
        raise DataError(Issue(str(certificate), "is not valid now", f"{own.not_valid_before_utc} to {own.not_valid_after_utc}"))


def make(folder: Path, parties: list[str], days: int = 30) -> None:
    """A throw-away authority and a certificate for each party, for simulations and trials."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("xutrain trial authority")).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=days))

    authority = ec.generate_private_key(ec.SECP256R1())
    own = builder("xutrain trial authority", authority.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    (folder / "ca.pem").write_bytes(own.sign(authority, hashes.SHA256()).public_bytes(pem))
    for party in parties:
        key = ec.generate_private_key(ec.SECP256R1())
        made = builder(party, key.public_key()).add_extension(x509.SubjectAlternativeName([x509.DNSName(party)]), critical=False)
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        (folder / f"{party}.pem").write_bytes(made.sign(authority, hashes.SHA256()).public_bytes(pem))
        file = folder / f"{party}.key"
        file.touch(mode=0o600)
        file.write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
