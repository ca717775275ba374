"""The stages, seen from the benchmark: prepare a place, let children measure in it, verify what they did."""
