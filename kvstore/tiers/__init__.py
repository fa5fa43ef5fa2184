"""One tier a file. ``files`` alone opens files, so that faults can be injected below everything else."""
