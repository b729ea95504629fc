"""Who watches calls: the call log, its dumps, and the watchdog."""
