"""How a frozen matrix is stored: one file per format."""
