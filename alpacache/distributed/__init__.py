"""One run on several GPUs: who takes part, how gradients and weights travel, who updates what."""
