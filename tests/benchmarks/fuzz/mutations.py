"""Mutations of sound files, which the fuzzers draw."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

from hypothesis import strategies as st

from ddpmctl.iclevr import INDEX

Fuzz = tuple[Callable[..., None], tuple[st.SearchStrategy[object], ...]]
"""A test, and what to draw for its arguments."""

# One mutation: where (a share of the length), what, and how long.
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("flip", "set", "cut", "insert", "copy", "end")), st.binary(min_size=1, max_size=12)),
    min_size=1,
    max_size=6,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | st.sampled_from(sorted(INDEX)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(INDEX)), inner, max_size=4),
    max_leaves=12,
)


def mutated(data: bytes, mutations: list[tuple[float, str, bytes]]) -> bytes:
    """Return the bytes after some mutations."""
    for place, kind, with_ in mutations:
        at = int(place * len(data))
        match kind:
            case "flip":
                data = data[:at] + bytes([data[at] ^ 1 << with_[0] % 8] if data else []) + data[at + 1 :]
            case "set":
                data = data[:at] + with_ + data[at + len(with_) :]
            case "cut":
                data = data[:at] + data[at + 1 + with_[0] :]
            case "insert":
                data = data[:at] + with_ + data[at:]
            case "copy":
                data = data[:at] + data[at : at + 50 * with_[0]] + data[at:]
            case "end":
                data = data[:at]
    return data


def repacked(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return an archive with a changed pickle and correct checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return out.getvalue()
