"""The position of a run in its data, and how exactly a resumed run continues from it."""
