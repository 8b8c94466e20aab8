"""How the layers of a decoder run: recomputed, offloaded, traced once."""
