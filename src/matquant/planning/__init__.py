"""Mix'n'Match: choose a width for every weight within a budget. Needs torch only to measure losses."""
