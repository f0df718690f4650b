"""Serving: one running batch for many requests, and the doors to it."""
