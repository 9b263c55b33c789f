"""The scheduler and the engine on a virtual clock: a benchmark at the speed of arithmetic."""
