"""Records and values that every room shares; imports nothing of the rest."""
