"""Bytes by URL: folders, retries, downloads, the local store and the lease (knows no cache, never torch)."""
