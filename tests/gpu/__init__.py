"""What only a GPU can show; `make test-gpu`, or `python3 -m tests.gpu` where there is no pytest."""
