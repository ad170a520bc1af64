"""Fine-tuning of encoders in plain torch and transformers: usable without Ray."""
