"""vLLM's recordings: `routed_experts` of requests, as `.npy`, base64 or whole HTTP responses.

vLLM writes no other statistics; knows nothing of the other engines.
"""

from __future__ import annotations

from moe_runtime.importers.routed_arrays import read

__all__ = ["read"]
