"""Many query tokens of each request against its keys in the paged pool."""
