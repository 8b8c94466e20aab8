"""The operating system: files, threads, signals, clocks, hardware."""
