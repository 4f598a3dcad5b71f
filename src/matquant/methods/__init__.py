"""How codes are chosen: one method, one file."""
