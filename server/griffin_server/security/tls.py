"""TLS: the credentials of this server, and those with which it calls others."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import grpc

from griffin_server.security.files import WatchedFiles
from griffin_server.settings import Settings

Pem: TypeAlias = bytes | None

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The files, in PEM, that an end of a connection has.

    Args:
        setting: what the settings that name them begin with, for errors.
        cert, key: its own certificate, with those between it and the root, and its key.
        ca: the certificates that the other end's must come from; None on a server asks for none,
            and on a client stands for the system's.
    """

    setting: str
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def watched(self, make: Callable[[Pem, Pem, Pem], T]) -> WatchedFiles[T]:
        """What ``make`` makes of the contents of cert, key and ca.

        Raises:
            BadSecurityFile: a file cannot be read, is no PEM, or the key is of another certificate.
        """
        return self._watched(lambda: make(*self._contents()))

    def watched_context(self) -> WatchedFiles[ssl.SSLContext]:
        """A server's context. With ``ca`` only clients with a certificate are let in.

        Raises:
            BadSecurityFile: see ``watched``.
        """
        return self._watched(self._context)

    def _watched(self, read: Callable[[], T]) -> WatchedFiles[T]:
        paths = tuple(path for path in (self.cert, self.key, self.ca) if path is not None)
        return WatchedFiles(self.setting, paths, read)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        if self.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context

    def _contents(self) -> tuple[Pem, Pem, Pem]:
        self._context()  # it says what is wrong with the files; gRPC does not
        cert, key, ca = (
            None if path is None else path.read_bytes() for path in (self.cert, self.key, self.ca)
        )
        return cert, key, ca


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The credentials of this server; None without TLS. Connections that begin after a file has
    changed use the new one; others are not disturbed. With ``tls_client_ca`` only clients with a
    certificate are let in.

    Raises:
        BadSecurityFile: see ``TlsFiles.watched``.
    """
    if settings.tls_cert is None:
        return None
    watched = TlsFiles(
        setting="tls_cert, tls_key, tls_client_ca",
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.tls_client_ca,
    ).watched(_configuration)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        found, is_new = watched.newer()
        return found if is_new else None

    return grpc.dynamic_ssl_server_credentials(
        watched.value,
        changed,  # type: ignore[arg-type]  # None stands for no change; the stubs lack it
        require_client_authentication=settings.tls_client_ca is not None,
    )


def scrape_context(settings: Settings) -> WatchedFiles[ssl.SSLContext] | None:
    """The TLS of the metrics port, of the files as they are now; None without TLS. With
    ``metrics_client_ca`` only clients with a certificate are let in.

    Raises:
        BadSecurityFile: see ``TlsFiles.watched``.
    """
    if settings.tls_cert is None:
        return None
    return TlsFiles(
        setting="tls_cert, tls_key, metrics_client_ca",
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.metrics_client_ca,
    ).watched_context()


def prefill_credentials(settings: Settings) -> WatchedFiles[grpc.ChannelCredentials] | None:
    """The credentials of the channels to prefill servers, of the files as they are now; None
    without TLS.

    Raises:
        BadSecurityFile: see ``TlsFiles.watched``.
    """
    if settings.prefill_ca is None and settings.prefill_cert is None:
        return None
    files = TlsFiles(
        setting="prefill_cert, prefill_key, prefill_ca",
        cert=settings.prefill_cert,
        key=settings.prefill_key,
        ca=settings.prefill_ca,
    )
    return files.watched(lambda cert, key, ca: grpc.ssl_channel_credentials(ca, key, cert))


def _configuration(cert: Pem, key: Pem, ca: Pem) -> grpc.ServerCertificateConfiguration:
    assert cert is not None and key is not None, "the settings ask for both"
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)
