"""New keys and values into the paged pool."""
