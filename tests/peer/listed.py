"""Tests of mergekit's suite that do not run as all others: parts of their ids, and why.

INTERNALS  run without the engine: what they look at is a part of mergekit that the engine takes the place of
STAYS      merge something that mergekit computes itself, by the rules in docs/MERGEKIT.md
"""

from __future__ import annotations

INTERNALS: dict[str, str] = {}
STAYS: dict[str, str] = {}
