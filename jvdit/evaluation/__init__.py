"""Measures what models make."""
