"""The base layer: errors, files, locks, threads, streams and progress. Nothing here knows about models."""
