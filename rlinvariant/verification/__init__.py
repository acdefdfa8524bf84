"""Is it exact here, on this model? Relations counted on a real engine and trainer, controls, a certificate."""
