"""The step guard inside the loops of Lightning, Hugging Face and Accelerate; each module needs its library alone."""
