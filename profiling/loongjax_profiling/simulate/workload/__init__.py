"""Which requests come when: arrivals, length distributions, and traces."""
