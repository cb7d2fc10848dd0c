"""Addresses as they are opened: signed by a hook, or by the account of a bucket.

The lock keeps addresses unsigned, because signatures run out. They are signed when pixels are read.
Further hooks come from installed packages, as entry points of the group ``terraloom.signers``: a
function that takes an address and returns the signed one. It is called for every read, from many
threads, and should keep its tokens.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from terraloom.acquire.retry import retry_policy
from terraloom.errors import ConfigError, SceneError

__all__ = ["GROUP", "PlanetaryComputer", "signed_href", "signers"]

#: Entry point group of signing hooks.
GROUP = "terraloom.signers"

Signer = Callable[[str], str]

#: A token is renewed this long before it runs out: a read may take minutes.
_EARLY = timedelta(minutes=5)
_TIMEOUT_S = (20.0, 60.0)
_BLOB = ".blob.core.windows.net"
#: Storage accounts of Planetary Computer that are open.
_OPEN = ("ai4edatasetspublicassets",)


def signed_href(href: str, sign: str | None) -> str:
    """Address that GDAL opens.

    Args:
        href: Address of the lock.
        sign: Name of a signing hook, or None.

    Returns:
        The address, signed where ``sign`` says how; an ``s3://bucket/key`` address as
        ``/vsis3/bucket/key``, which GDAL opens with the credentials of the environment. Local
        paths come back as they are.

    Raises:
        ConfigError: There is no such hook.
        SceneError: The hook cannot sign (no answer, no token).
    """
    if sign is not None:
        href = _hook(sign)(href)
    if href.lower().startswith("s3://"):
        return "/vsis3/" + href[5:]
    return href


def signers() -> list[str]:
    """Names of all signing hooks, sorted."""
    return sorted({"planetary-computer", *(e.name for e in entry_points(group=GROUP))})


@lru_cache(maxsize=16)
def _hook(name: str) -> Signer:
    if name == "planetary-computer":
        return PlanetaryComputer().sign
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            loaded: Signer = entry.load()
            return loaded
    raise ConfigError(
        f"there is no signing hook {name!r}",
        where="providers.sign of a source table",
        allowed=", ".join(signers()),
        fix=f"install the package that has it (entry point group {GROUP})",
    )


@dataclass
class _Token:
    text: str
    expires: datetime


@dataclass
class _Slot:
    """Token of one container; its lock lets one thread ask while the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    token: _Token | None = None


class PlanetaryComputer:
    """Signs addresses of Planetary Computer's storage with tokens of its public service.

    Args:
        url: Address of the token service; default: the environment's ``PC_SDK_SAS_URL``, else the
            public one.
        key: Key of an account, which a few collections ask for; default: the environment's
            ``PC_SDK_SUBSCRIPTION_KEY``.
    """

    URL = "https://planetarycomputer.microsoft.com/api/sas/v1/token"

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.url = (url or os.environ.get("PC_SDK_SAS_URL") or self.URL).rstrip("/")
        self.key = key or os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
        self._slots: dict[tuple[str, str], _Slot] = {}
        self._guard = threading.Lock()

    def sign(self, href: str) -> str:
        """The address with a token; addresses of other hosts and signed ones as they are.

        Raises:
            SceneError: The service gives no token.
        """
        parts = urlsplit(href)
        host = (parts.hostname or "").lower()
        account = host.removesuffix(_BLOB)
        container = parts.path.lstrip("/").split("/")[0]
        if not host.endswith(_BLOB) or account in _OPEN or not container:
            return href
        if re.search(r"(?:^|&)sig=", parts.query):
            return href
        token = self._token(account, container)
        return f"{href}{'&' if parts.query else '?'}{token}"

    def _token(self, account: str, container: str) -> str:
        with self._guard:
            slot = self._slots.setdefault((account, container), _Slot())
        with slot.lock:
            left = slot.token.expires - datetime.now(UTC) if slot.token else timedelta(0)
            if slot.token is None or left < _EARLY:
                try:
                    slot.token = self._ask(account, container)
                except SceneError:
                    # The old one may still do.
                    if slot.token is None or left <= timedelta(0):
                        raise
            return slot.token.text

    def _ask(self, account: str, container: str) -> _Token:
        import requests  # most archives need no token
        from requests.adapters import HTTPAdapter

        where = f"{self.url}/{account}/{container}"
        headers = {"Ocp-Apim-Subscription-Key": self.key} if self.key else {}
        try:
            with requests.Session() as session:
                for scheme in ("https://", "http://"):
                    session.mount(scheme, HTTPAdapter(max_retries=retry_policy()))
                answer = session.get(where, headers=headers, timeout=_TIMEOUT_S)
            answer.raise_for_status()
            body = answer.json()
            return _Token(str(body["token"]), _when(str(body["msft:expiry"])))
        except (requests.RequestException, ValueError, KeyError, TypeError) as err:
            raise SceneError(
                f"no token to read with ({' '.join(str(err).split()) or type(err).__name__})",
                where=where,
                fix="try again later; a collection that asks for an account needs its key in "
                "PC_SDK_SUBSCRIPTION_KEY",
            ) from err


def _when(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
