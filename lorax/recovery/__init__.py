"""Checkpoints, snapshots of weights, and the identity that a resumed run must share."""
