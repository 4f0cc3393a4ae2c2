"""Measures generated and reconstructed clips."""
