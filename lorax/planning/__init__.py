"""Memory, time and kernels of a run, predicted before it starts."""
