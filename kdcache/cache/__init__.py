"""The cache: plan, shards, manifest; writing, reading, verifying (numpy, zarr, pyarrow, fsspec; never torch)."""

from kdcache.cache.description import describe
from kdcache.cache.fields import targets_field, token_arrays
from kdcache.cache.folder import Folder
from kdcache.cache.order import epoch_order
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.shard_data import ShardData
from kdcache.cache.verify import VerifyReport, verify
from kdcache.cache.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheWriter",
    "Folder",
    "ShardData",
    "VerifyReport",
    "describe",
    "epoch_order",
    "open_cache",
    "targets_field",
    "token_arrays",
    "verify",
]
