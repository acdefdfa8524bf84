"""Is it exact here, on my model? Relations between a real engine and a trainer's model, negative controls, a certificate."""
