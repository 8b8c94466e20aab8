"""Settings, strict: YAML, names, types, conflicts."""
