"""Several processes in one run, with torch.distributed. Every function is the identity for a single process."""
