"""Certificates of a throwaway authority, good and bad, made with openssl."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

OPENSSL = shutil.which("openssl")
KINDS = ("good", "expired", "of a stranger", "of another host")


@dataclass(frozen=True, slots=True)
class Certificates:
    """A folder in which each kind has a certificate and a key; `in_use` is what a server is told to use."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """All kinds; a second or two."""
        made = cls(folder)
        for authority in ("authority", "stranger"):
            made._openssl(
                "req",
                "-x509",
                *_KEY,
                f"{authority}.key",
                "-out",
                f"{authority}.pem",
                "-days",
                "30",
                "-subj",
                f"/CN={authority}",
            )
        made._issue("good")
        made._issue("expired", days="-1")
        made._issue("of a stranger", authority="stranger")
        made._issue("of another host", host="DNS:elsewhere.invalid")
        made.use("good")
        return made

    @property
    def authority(self) -> Path:
        """Whom clients trust."""
        return self.folder / "authority.pem"

    @property
    def certificate(self) -> Path:
        """The server's, at the moment."""
        return self.folder / "in_use.pem"

    @property
    def key(self) -> Path:
        """The server's, at the moment."""
        return self.folder / "in_use.key"

    def use(self, kind: str) -> None:
        """From the server's next look on."""
        shutil.copy(self.folder / f"{kind}.pem", self.certificate)
        shutil.copy(self.folder / f"{kind}.key", self.key)

    def give(self, user: str | None) -> None:
        """The key must be its server's own."""
        if user is not None:
            shutil.chown(self.key, user)
        self.key.chmod(0o600)

    def _issue(self, kind: str, *, days: str = "30", authority: str = "authority", host: str = "IP:127.0.0.1") -> None:
        request, extension = self.folder / "request", self.folder / "extension"
        self._openssl("req", *_KEY, f"{kind}.key", "-out", str(request), "-subj", "/CN=server")
        extension.write_text(f"subjectAltName={host}\n")
        signer = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
        self._openssl(
            "x509",
            "-req",
            "-in",
            str(request),
            *signer,
            "-days",
            days,
            "-extfile",
            str(extension),
            "-out",
            f"{kind}.pem",
        )

    def _openssl(self, *arguments: str) -> None:
        subprocess.run([OPENSSL or "openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")
