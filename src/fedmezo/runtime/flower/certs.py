"""Files by which a server and its clients know each other: an authority, the server's certificate, a key per client.

    DIR/ca.crt  ca.key  server.pem  server.key
    DIR/client-0/ca.crt  key  key.pub        one such folder per client, to be copied to its machine

The server proves itself with its certificate (TLS), a client with its key, whose public half the server registers.
Private keys can be read by their owner only.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo.errors import ConfigError, missing
from fedmezo.runtime.flower.programs import Tls

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["ALWAYS", "client_tls", "keys_in", "make_certificates", "server_names", "server_tls", "trusted_tls"]

ALWAYS = ("localhost", "127.0.0.1")  # the server's own programs find it there
_SKEW = timedelta(hours=1)  # by which a clock may be behind
_PRIVATE, _PUBLIC = 0o600, 0o644


def make_certificates(folder: Path, *, hosts: Sequence[str], clients: int, days: int = 365) -> list[Path]:
    """Makes the files and returns their paths.

    Args:
      folder: where to; it must not hold any of them.
      hosts: names and addresses by which clients reach the server; localhost and 127.0.0.1 are added.
      clients: number of clients.
      days: how long the certificates are valid; the clients' keys have no end.

    Raises:
      ConfigError: cryptography is not installed, the folder holds files of that name, or cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec

    names = list(dict.fromkeys((*hosts, *ALWAYS)))
    _refuse_to_overwrite(folder)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    signed = _authority_certificate(authority, days=days)
    trusted = _pem(signed)
    files = {
        "ca.key": (_pkcs8(authority), _PRIVATE),
        "ca.crt": (trusted, _PUBLIC),
        "server.key": (_pkcs8(server), _PRIVATE),
        "server.pem": (_pem(_server_certificate(server, names, issuer=signed, key=authority, days=days)), _PUBLIC),
    }
    for number in range(clients):
        private, public = _pair()
        files[f"client-{number}/key"] = (private, _PRIVATE)
        files[f"client-{number}/key.pub"] = (public, _PUBLIC)
        files[f"client-{number}/ca.crt"] = (trusted, _PUBLIC)
    try:
        return [_write(folder / name, data, mode) for name, (data, mode) in files.items()]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None


def server_tls(folder: Path) -> Tls:
    """Returns what a server uses of a folder of certificates.

    Raises:
      ConfigError: a file is missing.
    """
    _check(folder, ("ca.crt", "server.pem", "server.key"), "the folder that `fedmezo certs init` made")
    return Tls(folder / "ca.crt", folder / "server.pem", folder / "server.key")


def client_tls(folder: Path) -> Tls:
    """Returns what a client uses of its folder.

    Raises:
      ConfigError: a file is missing.
    """
    _check(folder, ("ca.crt", "key"), "this client's own folder, such as client-0, copied from the server")
    return Tls(folder / "ca.crt", key=folder / "key")


def trusted_tls(folder: Path) -> Tls:
    """Returns what a command that only talks to a server uses of the server's folder or a client's.

    Raises:
      ConfigError: it has no certificate to trust.
    """
    _check(folder, ("ca.crt",), "the server's folder of certificates, or a client's")
    return Tls(folder / "ca.crt")


def keys_in(folder: Path) -> list[Path]:
    """Returns the clients' public keys in the server's folder, by client."""
    found = {path.parent.name.removeprefix("client-"): path for path in folder.glob("client-*/key.pub")}
    return [found[number] for number in sorted(found, key=lambda name: (len(name), name))]


def server_names(tls: Tls) -> list[str]:
    """Returns the names and addresses that a server's certificate is for.

    Raises:
      ConfigError: cryptography is not installed, or the file is no such certificate.
    """
    _need_cryptography()
    from cryptography import x509

    assert tls.cert is not None
    try:
        found = x509.load_pem_x509_certificate(tls.cert.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, OSError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise ConfigError(f"--certs: {tls.cert} is no certificate of a server ({error}); make it again.") from error
    return [str(name.value) for name in names]


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise missing("Certificates need the library cryptography", extra="flower") from None


def _check(folder: Path, names: Sequence[str], what: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"--certs: {folder} has no file {name}; give {what}.")


def _refuse_to_overwrite(folder: Path) -> None:
    there = [p for name in ("ca.*", "server.*", "client-*") for p in sorted(folder.glob(name))]
    if there:
        raise ConfigError(f"{there[0]} is there already, and keys are never replaced; name another folder.")


def _write(path: Path, data: bytes, mode: int) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    return path


def _pkcs8(key: "ec.EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _pem(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _pair() -> tuple[bytes, bytes]:
    """Returns a client's private and public key, in the form and on the curve that Flower asks for."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    return private, key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + b"\n"


def _begun(subject: str, days: int) -> "x509.CertificateBuilder":
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _authority_certificate(key: "ec.EllipticCurvePrivateKey", *, days: int) -> "x509.Certificate":
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    begun = _begun("fedmezo authority", days).issuer_name(_name("fedmezo authority")).public_key(key.public_key())
    extended = (
        begun.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return extended.sign(key, hashes.SHA256())


def _server_certificate(
    own: "ec.EllipticCurvePrivateKey",
    names: Sequence[str],
    *,
    issuer: "x509.Certificate",
    key: "ec.EllipticCurvePrivateKey",
    days: int,
) -> "x509.Certificate":
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    begun = _begun("fedmezo server", days).issuer_name(issuer.subject).public_key(own.public_key())
    alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
    # Python 3.13 refuses a certificate that does not name its issuer's key.
    from_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    extended = (
        begun.add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
        .add_extension(from_authority, critical=False)
    )
    return extended.sign(key, hashes.SHA256())


def _alternative(name: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise ConfigError(f"--host: expected a host's name or address in plain letters, got {name!r}.") from None


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
