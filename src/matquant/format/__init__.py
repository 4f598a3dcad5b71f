"""The nested checkpoint on disk: one reader, one writer."""
