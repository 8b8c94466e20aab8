"""Screen, log, loss curve and model card of a run."""
