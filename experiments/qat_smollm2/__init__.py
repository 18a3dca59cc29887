"""SmolLM2 trained in few bits: see README.md."""
