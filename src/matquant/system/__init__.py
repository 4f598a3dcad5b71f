"""The ground: errors, files, locks, threads, streams and progress. Nothing here knows what a model is."""
