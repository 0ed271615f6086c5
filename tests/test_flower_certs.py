"""Certificates and keys: what is made holds together, can be read by nobody else, and is never replaced."""

import ssl
import stat
import sys
import warnings
from ipaddress import ip_address
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("flwr")
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmezo.errors import ConfigError
from fedmezo.runtime.flower.certs import client_tls, keys_in, make_certificates, server_names, server_tls, trusted_tls

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "certs"
    make_certificates(folder, hosts=["tuning.example.org", "192.0.2.7"], clients=11, days=30)
    return folder


def shake_hands(folder: Path, *, trust: Path, name: str) -> None:
    """Does a whole TLS handshake in memory; raises ssl.SSLError when one side does not accept the other."""
    tls = server_tls(folder)
    served, asked = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context(cafile=str(trust))
    asked.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    served.load_cert_chain(tls.cert, tls.key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = served.wrap_bio(up, down, server_side=True)
    client = asked.wrap_bio(down, up, server_hostname=name)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)


@pytest.mark.parametrize("name", ["tuning.example.org", "192.0.2.7", "localhost", "127.0.0.1"])
def test_a_client_trusts_the_server_under_every_name_it_was_given(made, name):
    shake_hands(made, trust=client_tls(made / "client-3").ca, name=name)


def test_a_client_trusts_no_other_name_and_no_other_authority(made, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(made, trust=made / "ca.crt", name="example.org")
    make_certificates(tmp_path / "other", hosts=[], clients=1)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(made, trust=tmp_path / "other" / "ca.crt", name="localhost")


def test_certificates_say_what_they_are_for(made):
    authority = x509.load_pem_x509_certificate((made / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and usage.crl_sign and not usage.digital_signature
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purpose = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purpose) == [x509.ExtendedKeyUsageOID.SERVER_AUTH]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["tuning.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("192.0.2.7"), ip_address("127.0.0.1")]
    assert server_names(server_tls(made)) == ["tuning.example.org", "192.0.2.7", "localhost", "127.0.0.1"]
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 30


def test_clients_have_different_keys_on_the_curve_that_flower_takes(made):
    seen = set()
    for number in range(11):
        folder = made / f"client-{number}"
        private = serialization.load_ssh_private_key((folder / "key").read_bytes(), password=None)
        public = serialization.load_ssh_public_key((folder / "key.pub").read_bytes())
        assert isinstance(private.curve, ec.SECP384R1) and private.public_key() == public
        seen.add((folder / "key.pub").read_bytes())
    assert len(seen) == 11


def test_keys_come_by_client_not_by_spelling(made):
    assert [path.parent.name for path in keys_in(made)] == [f"client-{number}" for number in range(11)]


def test_private_keys_are_their_owner_s_alone(made):
    private = [made / "ca.key", made / "server.key", *made.glob("client-*/key")]
    assert len(private) == 13
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_nothing_is_ever_replaced(made):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is there already, and keys are never replaced"):
        make_certificates(made, hosts=[], clients=1)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_a_wrong_folder_is_told_with_the_right_one(made, tmp_path):
    with pytest.raises(ConfigError, match=r"has no file server\.pem"):
        server_tls(made / "client-0")
    with pytest.raises(ConfigError, match="this client's own folder, such as client-0"):
        client_tls(made)
    with pytest.raises(ConfigError, match=r"has no file ca\.crt"):
        trusted_tls(tmp_path)
    assert trusted_tls(made / "client-0").key is None


def test_a_name_that_no_certificate_can_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="in plain letters, got"):
        make_certificates(tmp_path / "certs", hosts=["bücher.example"], clients=1)
    assert not (tmp_path / "certs").exists()


def test_the_verb_makes_them_and_says_what_to_copy(tmp_path, capfd):
    asked = ["certs", "init", str(tmp_path / "c"), "--host", "a.example", "--clients", "2"]
    assert main(asked) == 0
    assert "Copy" in capfd.readouterr().out
    assert server_names(server_tls(tmp_path / "c"))[0] == "a.example" and len(keys_in(tmp_path / "c")) == 2
    assert main(asked) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmezo\[flower\]'"):
        make_certificates(tmp_path / "certs", hosts=[], clients=1)
