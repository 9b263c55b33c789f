"""`loongjax replay`: a workload on the real engine, and the same workload simulated."""
