"""The battery: what our tests and `llmkernels check` run, on our cases or on the user's own shapes."""
