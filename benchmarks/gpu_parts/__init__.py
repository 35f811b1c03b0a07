"""The parts of `benchmarks/gpu.py`: each has `main(small)`, which prints rows of JSON."""
