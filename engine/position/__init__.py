"""Where a run stands in its data, and how exactly a resumed run continues from there."""
