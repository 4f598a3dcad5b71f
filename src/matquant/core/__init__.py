"""The definition of nested codes, their grids and their storage. The same code runs on numpy and torch arrays."""
