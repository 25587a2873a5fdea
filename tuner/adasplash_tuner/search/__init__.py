"""How the fastest config is found: what is searched, in which order, within a budget, on one device or on many."""
