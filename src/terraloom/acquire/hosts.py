"""Which hosts an address from outside may name: not this machine, nor its own network.

A catalogue or a server of the internet that names ``http://169.254.169.254/`` or
``http://localhost:8000/`` would have this machine fetch what only it can reach. Names of hosts are
judged as they are written: what a name server makes of a public name is not looked at.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from terraloom.errors import SceneError

__all__ = ["is_inside", "may_lead_to"]

#: Names that only a machine's own network knows.
_OWN = re.compile(r"(?:^|\.)(?:localhost|local|internal|intranet|lan|home\.arpa)$")
#: An IPv4 address as programs read it: up to four numbers, also octal (0177.1) or hexadecimal.
_NUMBERS = re.compile(r"(?:0x[0-9a-f]*|\d+)(?:\.(?:0x[0-9a-f]*|\d+)){0,3}")


def is_inside(url: str) -> bool:
    """Whether an address names this machine or a host of a private network.

    These are addresses that are not of the public internet (loopback, link-local, private,
    reserved), in any notation; names without a dot; and names such as ``localhost``, ``x.local``
    and ``x.internal``. ``s3://`` addresses name buckets, never hosts.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https"):
        return False
    host = (parts.hostname or "").rstrip(".").lower()
    number = _address(host)
    if number is not None:
        mapped = getattr(number, "ipv4_mapped", None) or number
        return not mapped.is_global or mapped.is_multicast
    return "." not in host or _OWN.search(host) is not None


def may_lead_to(url: str, origin: str) -> None:
    """Refuse an address inside the own network that a document or server outside of it names.

    Args:
        url: Address that is to be read.
        origin: Address of what named it; a local file or a host inside may name hosts inside.

    Raises:
        SceneError: ``url`` is inside, ``origin`` is not.
    """
    outside = "://" in origin and not is_inside(origin)
    if outside and is_inside(url):
        raise SceneError(
            f"a host of a private network is named ({urlsplit(url).hostname!r})",
            where=urlsplit(origin).hostname or origin,
            allowed="hosts of the internet, since it comes from there",
            fix="report it to the owner of the catalogue; to read from a server of your own, "
            "use a catalogue of your own",
        )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The number behind a host that is one, or None."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not _NUMBERS.fullmatch(host):
        return None
    try:
        *first, last = (_number(part) for part in host.split("."))
    except ValueError:
        return None
    value = last + sum(n << 8 * (3 - i) for i, n in enumerate(first))
    return ipaddress.IPv4Address(value) if 0 <= value < 1 << 32 else None


def _number(text: str) -> int:
    if text.startswith("0x"):
        return int(text[2:] or "0", 16)
    return int(text, 8) if len(text) > 1 and text.startswith("0") else int(text)
