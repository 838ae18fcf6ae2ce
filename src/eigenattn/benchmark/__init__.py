"""Speed and memory, of kernels and of whole models, against the best that the machine has at full rank."""
