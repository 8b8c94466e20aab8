"""What lorax asks of the operating system: files, threads, signals, clocks, hardware."""
