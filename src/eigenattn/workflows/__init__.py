"""Whole commands in Python: from the names of models to folders, with model cards, and to figures."""
