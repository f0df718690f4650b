"""Whole files, locks, hashes and the folders of runs: what all other packages share."""
