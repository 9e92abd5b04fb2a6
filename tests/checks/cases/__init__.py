"""One module a family; each lists its :class:`tests.checks.case.OpCase` objects in ``CASES``."""
