"""Which key/value cache a bundle has: of the runtime's floats, or of 8-bit codes.

Codes take a quarter of the memory and cost a little loss, which scoring measured. A float cache with smaller weights
stands against a cache of codes with larger weights; whoever asks plans both ways and keeps the better.
"""

from __future__ import annotations

from packager.errors import UsageError
from packager.profile import FLOAT, INT8
from packager.scoremap.identity import MapIdentity

CACHE_TEXTS = {FLOAT: "floats", INT8: "8-bit codes (read by onnxruntime-genai; other loaders expect floats)"}


def offered(identity: MapIdentity, provider: str, wanted: str) -> tuple[tuple[str, ...], str]:
    """The caches to plan with where `wanted` is one of KV_CACHES, and why there is no choice, empty where there is or
    none was left.

    Raises UsageError where an 8-bit cache is demanded of a map that has none.
    """
    if wanted == FLOAT:
        return (FLOAT,), ""
    if identity.int8_cache is None:
        reason = "this map was scored without an 8-bit cache: score the model again"
    elif provider != "cpu":
        reason = f"the runtime reads 8-bit caches on the CPU only, not on {provider}"
    else:
        reason = identity.int8_cache.refusal
    if not reason:
        return ((INT8,) if wanted == INT8 else (FLOAT, INT8)), ""
    if wanted == INT8:
        raise UsageError(f"no 8-bit cache for {identity.model.name}: {reason}; or use --kv-cache float")
    return (FLOAT,), reason
