"""Training driver: teacher, student alone, student distilled, and a report that compares them.

Nothing is imported here, so that `import heteroakd_fast` never needs the `train` extra.
"""
