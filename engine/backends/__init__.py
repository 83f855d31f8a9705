"""Who computes: the record of ops, native kernels, packed weights, graphs."""
