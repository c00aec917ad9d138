"""CPU kernels of our own, compiled on first use where a C++ compiler is installed."""
