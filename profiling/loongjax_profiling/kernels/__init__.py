"""Speed of the attention ops on the machine at hand, each beside its rival."""
