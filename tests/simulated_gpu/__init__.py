"""A simulated GPU: torch's own CUDA build, on stand-ins for NVIDIA's libraries, on a machine without a GPU.

What is real: torch's CUDA code (its allocator, streams, events, device checks, copies), this library's host code, and
the order in which streams may work. What is simulated: device memory is host memory, a stream is a thread, kernels
compute nothing. Python computes the same operator on the CPU over the same bytes when the stream gets there
(`compute.py`), or, for races of whole libraries, nothing is computed and a roofline says how long it takes.

What is left out: real kernels and their efficiency, contention between copies and kernels, jitter, the time of page
locking at full size, everything a driver may refuse.

`python -m tests.simulated_gpu` runs Python on it; `card` reads and sets what the card does; `plugin` is for pytest.
"""
