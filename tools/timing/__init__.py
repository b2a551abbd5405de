"""What bench.py alone uses: what is timed, and the tables and pictures of it."""
