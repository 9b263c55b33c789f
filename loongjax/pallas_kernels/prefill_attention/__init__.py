"""Packed queries against packed keys, of which each row sees one contiguous range."""
