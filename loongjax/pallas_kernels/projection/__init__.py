"""Products of few rows with large matrices, as in a decode step: bound by reading the weights once."""
