"""The live page: what a run shows in a browser, and how it is steered from there."""

__all__: list[str] = []
