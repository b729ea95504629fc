"""Watches calls: the call log, its dumps, and the watchdog."""
