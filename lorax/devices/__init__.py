"""Where arrays live, and what is compiled for it: mesh, partitions, caches of programs."""
