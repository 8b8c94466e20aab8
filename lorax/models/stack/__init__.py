"""Running the layers of a decoder: recomputation, offloading, tracing once."""
