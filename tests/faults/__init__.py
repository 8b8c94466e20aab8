"""Faults that a run must survive, and the scorecard of them."""
