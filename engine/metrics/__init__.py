"""Named metrics over one pass of a data set, and the names that may be logged."""
