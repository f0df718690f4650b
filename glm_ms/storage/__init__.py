"""Files, locks, hashes, run folders and readers: the ground floor that all other packages use."""
