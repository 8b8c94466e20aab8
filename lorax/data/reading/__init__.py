"""Files and data sets to rows, and rows to conversations."""
