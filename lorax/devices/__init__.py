"""Mesh, partitions, placement of arrays, caches of compiled programs."""
