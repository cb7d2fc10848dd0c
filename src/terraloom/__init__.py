"""Terraloom: from satellite archives and a few labels to maps that can be trusted."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
