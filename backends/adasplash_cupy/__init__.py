"""The CuPy backend: raw CUDA kernels (``src/``), compiled at run time by NVRTC. Imports cupy on first use only."""
