"""What a person sees of a run: screen, log, curve, model card."""
