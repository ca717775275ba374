"""The few calls of RabbitMQ's management API that the sandbox needs: milliseconds each, rabbitmqctl takes a second."""

from __future__ import annotations

import base64
import http.client
import json
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from relay.errors import SandboxError

REQUEST_TIMEOUT_S = 30.0

# https://www.rabbitmq.com/docs/access-control#authorisation
ALL_PERMISSIONS = {"configure": ".*", "write": ".*", "read": ".*"}


class ManagementApi:
    """One broker's management API. Every method blocks."""

    def __init__(self, url: str, *, user: str, password: str) -> None:
        self._url = url
        self._user = user
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._opener = build_opener(ProxyHandler({}))  # HTTP_PROXY is not for loopback

    def answers(self) -> bool:
        """True when the API is up and lets us in."""
        try:
            self.request("GET", "/api/whoami")
        except SandboxError:
            return False
        return True

    def create_vhost(self, name: str) -> None:
        """Create a virtual host in which our user may do all. Quiet if there is one of that name."""
        self.request("PUT", f"/api/vhosts/{_segment(name)}", {})
        self.request("PUT", f"/api/permissions/{_segment(name)}/{_segment(self._user)}", ALL_PERMISSIONS)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it. Quiet if there is none."""
        self.request("DELETE", f"/api/vhosts/{_segment(name)}", missing_is_fine=True)

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, object] | dict[str, str] | None = None,
        *,
        missing_is_fine: bool = False,
    ) -> bytes:
        """One call; the answer's body. Raises `SandboxError` with the broker's answer on any failure."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        request = Request(self._url + path, data=data, headers=headers, method=method)  # noqa: S310 - always http
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                answer: bytes = response.read()
                return answer
        except HTTPError as error:
            with error:
                if error.code == http.client.NOT_FOUND and missing_is_fine:
                    return b""
                explanation = error.read().decode(errors="replace")
            raise SandboxError(f"RabbitMQ's management API: {method} {path}: {error.code} {explanation}") from error
        except (URLError, OSError, http.client.HTTPException) as error:
            raise SandboxError(f"RabbitMQ's management API at {self._url} does not answer: {error}") from error


def _segment(name: str) -> str:
    return quote(name, safe="")
