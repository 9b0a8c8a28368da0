"""What `benchmarks.gpu` shows, one section in each module."""
