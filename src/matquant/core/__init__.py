"""The definition: nested codes, their grids and how they are stored. The same lines run on numpy and torch arrays."""
