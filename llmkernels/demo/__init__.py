"""The parts of `llmkernels demo`: text, a small language model, lockstep training, a picture."""
