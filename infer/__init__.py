"""The model (joint attention, schedules, intrinsic VAE) and the sampler."""
