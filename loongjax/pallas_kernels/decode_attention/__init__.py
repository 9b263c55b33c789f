"""One query token of each request against its keys in the paged pool."""
