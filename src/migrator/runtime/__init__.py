"""The process around a run: logs, signals, child processes and reports."""
