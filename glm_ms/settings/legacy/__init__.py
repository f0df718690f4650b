"""MindFormers YAML files in our keys."""
