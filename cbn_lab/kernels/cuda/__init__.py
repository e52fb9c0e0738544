"""The CUDA engine: four sweeps over the data in Triton."""
