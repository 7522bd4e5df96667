"""Benchmarks of the public API."""
