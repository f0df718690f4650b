"""C++ kernels for the CPU: their build, their library, their operators."""
