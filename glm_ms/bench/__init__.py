"""Speed and memory on this machine, side by side with other programs: `glm-ms bench`."""
