"""Keys and certificates of the parties: one authority, one folder a role, carried to its machine.

After the handshake the peer's **role** is checked (the URI `deepshare:server` in its certificate), its host name is
not: the authority signs for nobody but the parties of one installation, so a certificate says who a peer is wherever it
stands; a host name would have to be known when the keys are made, and a dealer at the server's address would still not
be the server.
"""

import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from deepshare.files import write_whole
from deepshare.secure.errors import SecureError
from deepshare.secure.net.folders import appearing

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Role = Literal["server", "client", "dealer"]
ROLES = get_args(Role)
DAYS = 365
MOST_CLIENTS = 1000
_URI = "deepshare:"
_CLOCKS_DIFFER = timedelta(hours=1)  # a machine whose clock is a little behind takes the certificate too


@dataclass(frozen=True)
class Identity:
    """One role's folder: what a process shows of itself and whom it trusts."""

    role: Role
    folder: Path

    @classmethod
    def load(cls, folder: Path | str, role: Role) -> "Identity":
        """The identity in `folder`, which must be for `role`.

        Raises:
            SecureError: a file is missing, unreadable, expired or open to others, or the folder is for another role.
        """
        folder = Path(folder)
        for name in ("key.pem", "cert.pem", "ca.pem"):
            if not (folder / name).is_file():
                raise SecureError(f"secure: --keys {folder}: {name} is missing ('deepshare secure keys' makes it)")
        if stat.S_IMODE((folder / "key.pem").stat().st_mode) & 0o077:
            raise SecureError(f"secure: {folder / 'key.pem'} can be read by others (wanted mode 0600: chmod 600)")
        certificate = _read_certificate(folder / "cert.pem")
        found = _role_in(certificate)
        if found != role:
            raise SecureError(f"secure: --keys {folder} must be a {role}'s (got {found or 'no role'})")
        if certificate.not_valid_after_utc < datetime.now(UTC):
            raise SecureError(f"secure: the certificate in {folder} expired on {certificate.not_valid_after_utc:%F}")
        return cls(role, folder)

    def context(self, *, listening: bool) -> ssl.SSLContext:
        """TLS 1.3, this certificate, and none but the authority's peers."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listening else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the role is checked: see above
        context.verify_mode = ssl.CERT_REQUIRED
        if listening:
            context.num_tickets = 0  # no resumption: every connection shows its certificate
        try:
            context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
            context.load_verify_locations(self.folder / "ca.pem")
        except (OSError, ssl.SSLError) as error:
            raise SecureError(f"secure: --keys {self.folder} cannot be loaded ({error})") from error
        return context


def role_of(peer_certificate: dict[str, Any] | None) -> str | None:
    """The role in a certificate as `SSLSocket.getpeercert()` gives it."""
    names = (peer_certificate or {}).get("subjectAltName", ())
    roles = [value.removeprefix(_URI) for kind, value in names if kind == "URI" and value.startswith(_URI)]
    return roles[0] if len(roles) == 1 and roles[0] in ROLES else None


def make_keys(folder: Path | str, *, clients: int = 1, days: int = DAYS) -> list[Path]:
    """Makes FOLDER/authority, FOLDER/server, FOLDER/dealer and FOLDER/client (client-1, ... if there are several).

    Ed25519 throughout. Folders 0700, files 0600; the whole appears at once or not at all. The authority's key signs
    further parties; no process reads it.

    Returns:
        the roles' folders.

    Raises:
        SecureError: `folder` exists and is not empty, or a number is out of range. OSError: it cannot be written.
    """
    folder = Path(folder)
    if not 1 <= clients <= MOST_CLIENTS or not 1 <= days <= 3650:
        raise SecureError(
            f"secure: keys are made for 1..{MOST_CLIENTS} clients and 1..3650 days (got {clients} and {days})"
        )
    names = ["client"] if clients == 1 else [f"client-{number}" for number in range(1, clients + 1)]
    with appearing(folder, "keys are") as beside:
        authority = _Authority.fresh(days)
        authority.save(beside / "authority")
        for name in ("server", "dealer", *names):
            _save_party(beside / name, authority, name)
    return [folder / name for name in ("server", "dealer", *names)]


@dataclass(frozen=True)
class _Authority:
    key: "Ed25519PrivateKey"
    certificate: "x509.Certificate"
    days: int

    @classmethod
    def fresh(cls, days: int) -> "_Authority":
        x509, ed25519 = _cryptography()
        key = ed25519.Ed25519PrivateKey.generate()
        builder = _builder("deepshare authority", "deepshare authority", key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(key, builder.sign(key, None), days)

    def issue(self, name: str, role: str, public_key: Any) -> "x509.Certificate":
        x509, _ = _cryptography()
        builder = _builder(name, "deepshare authority", public_key, self.days)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        purposes = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage(purposes), False),
            (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_URI + role)]), False),
            (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
            (own, False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, None)

    @property
    def pem(self) -> bytes:
        return _certificate_pem(self.certificate)

    def save(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        write_whole(folder / "key.pem", _key_pem(self.key), mode=0o600)
        write_whole(folder / "cert.pem", self.pem, mode=0o600)


def _save_party(folder: Path, authority: _Authority, name: str) -> None:
    _, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    folder.mkdir(mode=0o700)
    issued = authority.issue(name, name.split("-")[0], key.public_key())
    for file, content in (("key", _key_pem(key)), ("cert", _certificate_pem(issued)), ("ca", authority.pem)):
        write_whole(folder / f"{file}.pem", content, mode=0o600)


def _builder(name: str, issuer: str, public_key: Any, days: int) -> "x509.CertificateBuilder":
    x509, _ = _cryptography()
    now = datetime.now(UTC)
    subject, signer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    x509, _ = _cryptography()
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


def _key_pem(key: "Ed25519PrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def _certificate_pem(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _read_certificate(path: Path) -> "x509.Certificate":
    x509, _ = _cryptography()
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SecureError(f"secure: {path} is no readable certificate ({error})") from error


def _role_in(certificate: "x509.Certificate") -> str | None:
    x509, _ = _cryptography()
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return role_of({"subjectAltName": [("URI", uri) for uri in uris]})


def _cryptography() -> tuple[Any, Any]:
    """(x509, ed25519) of the package `cryptography`, which only the extra `secure` brings."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SecureError(
            f"secure: needs the package cryptography: pip install 'deepshare[secure]' ({error})"
        ) from error
    return x509, ed25519
