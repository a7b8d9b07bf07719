"""What a process shows: standard streams, progress, and reports."""
