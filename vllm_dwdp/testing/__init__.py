"""What tests, benchmarks and the demo share: random checkpoints, real servers, a fake CUDA driver."""
