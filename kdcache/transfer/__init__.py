"""Push and pull: copy a finished cache, or a part of it, to or from another location (no torch)."""
