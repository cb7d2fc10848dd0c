"""When a request that failed is made again."""

from __future__ import annotations

from typing import Any

from urllib3.util import Retry

__all__ = ["BACKOFF_S", "RETRIES", "WAIT_S", "retry_policy"]

#: Attempts after a failed request; waits grow as BACKOFF_S * 2^n seconds.
RETRIES = 4
BACKOFF_S = 0.5
#: A server that asks to wait longer (Retry-After) is asked again after this many seconds.
WAIT_S = 120.0


class _Retry(Retry):
    """Waits as the server asks (Retry-After), but not for hours."""

    def get_retry_after(self, response: Any) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, WAIT_S)


def retry_policy() -> Retry:
    """Which requests are made again, and when: 429, server errors, broken connections."""
    return _Retry(
        total=RETRIES,
        backoff_factor=BACKOFF_S,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
    )
