"""The model: joint attention, the denoiser, LoRA, schedules, the intrinsic VAE."""
