"""TLS before a plain server, as a gateway does it: a certificate of a CA made here, and a proxy that ends the encryption."""

from __future__ import annotations

import datetime
import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LOOPBACK = "127.0.0.1"


def make_certificates(folder: Path) -> tuple[Path, Path]:
    """A CA's certificate, and key and certificate of a server on loopback in one file."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("test CA", LOOPBACK))

    def signed(name: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(issuer, name, public, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
        return builder.add_extension(extension, critical=True).sign(ca_key, hashes.SHA256()).public_bytes(encoding)

    encoding = serialization.Encoding.PEM
    ca, server = folder / "ca.pem", folder / "server.pem"
    ca.write_bytes(signed(issuer, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=None)))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))])
    plain = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    server.write_bytes(plain + signed(subject, key.public_key(), names))
    return ca, server


@contextmanager
def tls_before(url: str, server: Path) -> Iterator[str]:
    """The https:// address at which the server at `url` answers until the end of the block."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    target = (parts.hostname, parts.port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)
    with closing(socket.create_server((LOOPBACK, 0))) as door:
        threading.Thread(target=_serve, args=(door, context, target), daemon=True).start()
        yield f"https://{LOOPBACK}:{door.getsockname()[1]}"


def _serve(door: socket.socket, context: ssl.SSLContext, target: tuple[str, int]) -> None:
    with suppress(OSError):  # the door is closed at the end
        while True:
            caller, _ = door.accept()
            threading.Thread(target=_join, args=(caller, context, target), daemon=True).start()


def _join(caller: socket.socket, context: ssl.SSLContext, target: tuple[str, int]) -> None:
    """One connection, until either side ends it. TLS must not be read and written at once, so one thread does both."""
    with (
        suppress(OSError),
        closing(caller),
        socket.create_connection(target) as inner,
        context.wrap_socket(caller, server_side=True) as outer,
    ):
        while True:
            ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
            for source in ready:
                if not (data := source.recv(65536)):
                    return
                (inner if source is outer else outer).sendall(data)
