"""Mix'n'Match: which width every weight gets, for a budget. Needs torch only where a loss is measured."""
